"""Copies of remote files on this machine's disk, one for all its processes: read from the network once, then mapped."""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from merging.io import hashing, storage
from merging.io.fact_cache import cache_directory
from merging.io.prefetch import download
from merging.io.process import try_lock

SWITCH = "MERGEQUEST_COPIES"
"""The environment variable that allows none if it is 0."""
FREE, ENOUGH = 0.1, 8e9
"""Share of the disk that stays free, or bytes if they are less: where a copy would take of that, none is made."""
OWN, LOCK = "mergequest-own-", ".lock"
"""What the directories of single processes begin with, and the file in them that their owner keeps locked."""
UNUSED = 7 * 86400.0
"""Seconds after which a copy that nobody opened is removed when another one is made."""

_locks: list[IO[str]] = []


def copy_of(path: str) -> Path | None:
    """The copy of a remote file as it is now; None where there is none.

    Raises:
        StorageError: The file is missing.
    """
    if not _directory().is_dir() or (copy := _place(path)) is None or not copy.exists():
        return None
    with suppress(OSError):
        os.utime(copy)
    return copy


def made(path: str) -> Path | None:
    """The copy of a remote file, made now if there is none; None where there is no room, or no right, or no wish to.

    Of several processes that ask at once, one makes it.

    Raises:
        StorageError: The file is missing or unreadable.
    """
    copy = _place(path) if os.environ.get(SWITCH) != "0" else None
    if copy is None:
        return None
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _locked(copy):
            if copy.exists():
                os.utime(copy)
                return copy
            _tidy(copy.parent)
            disk = shutil.disk_usage(copy.parent)
            if disk.free - storage.size(path) < min(FREE * disk.total, ENOUGH):
                return None
            coming = copy.with_suffix(".tmp")
            try:
                download(path, coming)
                coming.replace(copy)
            finally:
                coming.unlink(missing_ok=True)  # a full disk shall not stay full
            return copy
    except OSError:
        return None


def own_directory() -> Path:
    """A new directory that goes with this process; what a killed one left goes with the next that asks."""
    shared = Path(tempfile.gettempdir())
    for left in shared.glob(f"{OWN}*"):
        with suppress(OSError), (left / LOCK).open() as lock:  # its owner lives, or removed it just now
            if try_lock(lock.fileno()) == "held":
                shutil.rmtree(left, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=OWN))
    lock = (directory / f"{LOCK}.new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (directory / f"{LOCK}.new").rename(directory / LOCK)
    _locks.append(lock)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _directory() -> Path:
    return cache_directory() / "copies"


def _place(path: str) -> Path | None:
    """Where the copy is or would be; None where nothing tells the file from what it was or will be."""
    checksum = storage.checksum(path)
    return _directory() / hashing.fingerprint([path, checksum]) if checksum else None


@contextmanager
def _locked(copy: Path) -> Iterator[None]:
    """Keeps other processes of this machine from the copy for the block; the lock dies with its process."""
    with copy.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tidy(directory: Path) -> None:
    """Removes what was not opened for long, and what a killed process left."""
    for file in directory.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > UNUSED:
                file.unlink()
