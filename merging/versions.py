"""Versions of the program and of the packages that results depend on."""

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """An installed package's version; `unknown` of one that is not, as mergequest sent to a cluster in a working directory."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def code_version() -> str:
    """Mergequest's version."""
    return version_of("mergequest")
