"""Small facts that took long to find, kept in this user's cache directory for the next process on this machine."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from merging import storage
from merging.errors import StorageError


def remembered(key: Sequence[str], find: Callable[[], str]) -> str:
    """A fact from the cache, else from `find`, and then kept; where there is no right to write, it is found again.

    Args:
        key: All that the fact depends on; with an empty string in it, nothing is known well enough to be kept.
        find: Finds it.
    """
    if not all(key):
        return find()
    file = str(_directory() / storage.fingerprint(list(key)))
    try:
        return storage.read_text(file)
    except StorageError:
        fact = find()
    try:
        storage.write_text(file, fact)
    except StorageError:
        return fact
    return fact


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergequest" / "facts"
