"""Files, local or at any fsspec address: looked for, listed and read."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from merging.errors import StorageError
from merging.io.addresses import S3, base_name, file_system, is_local, local_path, named

SETTLED = 2.0
"""Seconds after which a change of a local file shows in its times: file systems keep them no finer than that."""
CHECKSUMS = ("ETag", "md5Hash", "checksum", "etag")
"""What clients call it in a file's information: those of S3 and the web, of Google's store, of others, of Azure's."""


def exists(path: str) -> bool:
    """Whether there is a file or directory at `path`.

    Raises:
        StorageError: It is no path, its name is too long, or the server does not say.
    """
    if is_local(path):
        with named(path, "look for"):
            return local_path(path).exists()
    system, inner = file_system(path)
    with named(path, "look for"):
        return bool(system.exists(inner)) if isinstance(system, AsyncFileSystem) else bool(_info(system, inner))


def is_dir(path: str) -> bool:
    """Whether there is a directory at `path`.

    Raises:
        StorageError: As `exists`.
    """
    if is_local(path):
        with named(path, "look for"):
            return local_path(path).is_dir()
    system, inner = file_system(path)
    with named(path, "look for"):
        return bool(
            system.isdir(inner) if path.partition("://")[0] in S3 else _info(system, inner).get("type") == "directory"
        )


def _info(system: AbstractFileSystem, inner: str) -> dict[str, Any]:
    """What a store says of a file or directory; empty where there is none.

    Most clients' `isdir`, and `exists` of many, take a store that does not answer for one that has nothing there.
    """
    try:
        return dict(system.info(inner))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def list_dir(path: str) -> list[str]:
    """Sorted base names of what lies directly in `path`; empty where there is nothing."""
    if is_local(path):
        with named(path, "list"):
            directory = local_path(path)
            return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    system, inner = file_system(path)
    with named(path, "list"):
        system.invalidate_cache(inner)
        try:
            entries = system.ls(inner, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({base_name(entry) for entry in entries} - {base_name(inner), ""})


def list_files(path: str, *, hidden: bool = True) -> dict[str, int]:
    """Every regular file below `path`, by its path relative to it, sorted, with its size in bytes.

    Links to files are files; links to directories are not followed, so that nothing is listed twice or for ever.

    Args:
        path: The directory.
        hidden: Whether local directories are looked into whose names begin with a dot.
    """
    if is_local(path):
        root = local_path(path)
        with named(path, "list"):
            below: list[Path] = []
            for where, directories, names in os.walk(root):
                directories[:] = [name for name in directories if hidden or not name.startswith(".")]
                below += [Path(where) / name for name in names]
            return {str(file.relative_to(root)): file.stat().st_size for file in sorted(below) if file.is_file()}
    system, inner = file_system(path)
    with named(path, "list"):
        system.invalidate_cache(inner)
        try:
            entries = system.find(inner, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        root_name = inner.strip("/") + "/"
        below_root = {
            name.lstrip("/").removeprefix(root_name): int(info.get("size") or 0)
            for name, info in (entries.items() if isinstance(entries, dict) else ())  # adlfs has a list for a file
            if name.lstrip("/").startswith(root_name)  # other clients list the file itself
        }
        return dict(sorted((name, size) for name, size in below_root.items() if name and not name.endswith("/")))


def make_dir(path: str) -> None:
    """Makes the directory `path` and its parents where the file system has directories.

    Raises:
        StorageError: There is no right to write there, or a file is in the way.
    """
    if is_local(path):
        with named(path, "make directory"):
            local_path(path).mkdir(parents=True, exist_ok=True)


def read_bytes(path: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file, or all of it.

    Raises:
        StorageError: The file is missing or unreadable, or no file.
    """
    if is_local(path):
        with named(path, "read"), _opened(path) as file:
            file.seek(start or 0)
            return _read_up_to(file, None if stop is None else max(stop - (start or 0), 0))
    system, inner = file_system(path)
    with named(path, "read"):
        return bytes(system.cat_file(inner, start=start, end=stop))


def read_text(path: str) -> str:
    """A UTF-8 file.

    Raises:
        StorageError: The file is missing, unreadable or not text.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is not a UTF-8 text file") from error


@contextmanager
def open_to_read(path: str) -> Iterator[BinaryIO]:
    """A file to read, wherever it lies."""
    if is_local(path):
        with _opened(path) as file:
            yield file
        return
    system, inner = file_system(path)
    with system.open(inner, "rb") as file:
        yield file


def size(path: str) -> int:
    """A file's size in bytes.

    Raises:
        StorageError: The file is missing, or no file.
    """
    if is_local(path):
        with named(path, "read"):
            status = local_path(path).stat()
            _require_regular(path, status.st_mode)
            return status.st_size
    system, inner = file_system(path)
    with named(path, "read"):
        length = system.size(inner)
    if length is None:
        raise StorageError(f"cannot read {path}: it is a directory, not a file")
    return int(length)


def checksum(path: str) -> str:
    """What tells a file's contents from others without reading it; empty where nothing does.

    Of a remote file, what its server keeps. Of a local one, number, size and times, once these are old enough that
    another write must change them.

    Raises:
        StorageError: The file is missing.
    """
    if is_local(path):
        with named(path, "read"):
            status = local_path(path).stat()
        if time.time() - max(status.st_mtime, status.st_ctime) < SETTLED:
            return ""
        return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
    system, inner = file_system(path)
    with named(path, "read"):
        info = system.info(inner)
    return str(next((info[name] for name in CHECKSUMS if info.get(name)), ""))


def remove(path: str) -> None:
    """Removes a file if it is there."""
    with named(path, "remove"):
        if is_local(path):
            local_path(path).unlink(missing_ok=True)
        else:
            system, inner = file_system(path)
            if exists(path):
                system.rm_file(inner)


def require_files(path: str) -> None:
    """Looks whether all that a local directory holds, and the directories in it, can be read to an end.

    Libraries open files of a checkpoint by themselves, and would wait at a pipe for ever.

    Raises:
        StorageError: There is a pipe, socket or device.
    """
    if not is_local(path):
        return
    with named(path, "list"):
        for entry in _entries(local_path(path)):
            mode = entry.stat().st_mode if entry.exists() else stat.S_IFREG
            if not stat.S_ISDIR(mode):
                _require_regular(str(entry), mode)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A local file to read, which is one: of a pipe or a device nobody knows when reading ends.

    Raises:
        StorageError: It is something else.
        OSError: It is missing or unreadable.
    """
    handle = os.open(local_path(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb", buffering=0) as file:
        _require_regular(path, os.fstat(handle).st_mode)
        yield cast(BinaryIO, file)


def _require_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise StorageError(f"cannot read {path}: it is {what}, not a file")


def _entries(directory: Path) -> Iterator[Path]:
    """What lies in a directory, and in those that lie in it."""
    for entry in directory.iterdir():
        yield entry
        if entry.is_dir():
            yield from entry.iterdir()


def _read_up_to(file: BinaryIO, count: int | None) -> bytes:
    """So many bytes, or all: one call of the system reads 2 GiB at most."""
    if count is None:
        return file.read()
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
