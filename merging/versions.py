"""Versions of the program and of the packages that results depend on."""

from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_of(package: str) -> str:
    """An installed package's version; `unknown` of one that is not, as mergequest sent to a cluster in a working directory."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def code_version() -> str:
    """Mergequest's version."""
    return version_of("mergequest")


@cache
def code_fingerprint() -> str:
    """Content hash of the code that merges and measures, which changes between versions too, a method of one's own with it."""
    root, digest = Path(__file__).parent, sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
