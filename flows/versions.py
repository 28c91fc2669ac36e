"""The program's own version."""

from importlib.metadata import PackageNotFoundError, version


def code_version() -> str:
    """Mergequest's version; of an uninstalled working directory, what is known of it."""
    try:
        return version("mergequest")
    except PackageNotFoundError:
        return "unknown"
