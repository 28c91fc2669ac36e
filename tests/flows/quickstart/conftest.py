import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.quickstart.sentiment import DOMAINS, INNER

SAMPLES = {
    "movie": "1\t2.27\tThe Rock is destined to be great.\r\n2\t-0.6\tEffective but too tepid biopic\r\n"
    "3\t0.5\tNeither here nor there.\r\n4\t0.4\tA film.\r\n5\t2.5\tLilo &amp; Stitch!\r\n"
    "6\t-1.0\tEffective, but too tepid biopic!\r\n7\t1.0\t...",
    "amazon": "1_1\t-0.9\tno picture .\r\n1_2\t-0.15\trepost from january .\r\n2_1\t1.5\tgreat phone !\r\n"
    "3_1\t-2\tit broke .\r\n3_2\t0.1\tit is black .\r\n",
    "nyt": "1_1\t0.4\tOn Dec. 19, around noon.\r\n2_1\t1.5\tIt's a celebration.\r\n3_1\t-1.5\tA war.\r\n",
    "tweets": "1\t2.7\tSo lucky &lt;3\r\n2\t-1.4\tUgh.\r\n3\t0\tAt home.\r\n",
}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def sample() -> dict[str, str]:
    return dict(SAMPLES)


@pytest.fixture
def make_archive(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes ratings by domain as vaderSentiment's source distribution holds them."""

    def make(ratings: dict[str, str]) -> Path:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w:gz") as archive:
            for domain, text in ratings.items():
                add(archive, f"hutto_ICWSM_2014/{DOMAINS[domain]}", text.encode())
        path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            add(archive, f"vaderSentiment-3.3.2/{INNER}", inner.getvalue())
        return path

    return make
