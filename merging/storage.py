"""Files, local or at any fsspec address (`s3://…`): what is read whole, and what is written at once or not at all."""

import hashlib
import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from merging.errors import StorageError


def is_local(path: str) -> bool:
    """Whether `path` names this machine's file system."""
    return "://" not in path or path.startswith("file://")


def local_path(path: str) -> Path:
    """The local path that `path` names."""
    return Path(path.removeprefix("file://"))


def absolute(path: str) -> str:
    """`path` made independent of the working directory; addresses stay as they are."""
    return str(local_path(path).expanduser().absolute()) if is_local(path) else path


def join(path: str, *names: str) -> str:
    """`path` with `names` below it."""
    return posixpath.join(path, *names)


def base_name(path: str) -> str:
    """The last component of `path`."""
    return posixpath.basename(path.rstrip("/"))


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that serves `path`, and the path within it.

    Raises:
        StorageError: The protocol is unknown or its package is not installed.
    """
    try:
        system, inner = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise StorageError(f"cannot open {path}: {error}. Is the package of that protocol installed?") from error
    return system, inner


@contextmanager
def _named(path: str, doing: str) -> Iterator[None]:
    """Turns an operating system's or a server's error into one that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"cannot {doing} {path}: it does not exist") from error
    except OSError as error:
        raise StorageError(f"cannot {doing} {path}: {error.strerror or error}") from error


def exists(path: str) -> bool:
    """Whether there is a file or directory at `path`."""
    if is_local(path):
        return local_path(path).exists()
    system, inner = file_system(path)
    with _named(path, "look for"):
        return bool(system.exists(inner))


def is_dir(path: str) -> bool:
    """Whether there is a directory at `path`."""
    if is_local(path):
        return local_path(path).is_dir()
    system, inner = file_system(path)
    with _named(path, "look for"):
        return bool(system.isdir(inner))


def list_dir(path: str) -> list[str]:
    """Sorted base names of what lies directly in `path`; empty where there is nothing."""
    if is_local(path):
        directory = local_path(path)
        return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    system, inner = file_system(path)
    with _named(path, "list"):
        system.invalidate_cache(inner)
        if not system.exists(inner):
            return []
        return sorted(base_name(entry) for entry in system.ls(inner, detail=False))


def make_dir(path: str) -> None:
    """Makes the directory `path` and its parents where the file system has directories.

    Raises:
        StorageError: There is no right to write there, or a file is in the way.
    """
    if is_local(path):
        with _named(path, "make directory"):
            local_path(path).mkdir(parents=True, exist_ok=True)


def read_bytes(path: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file, or all of it.

    Raises:
        StorageError: The file is missing or unreadable.
    """
    system, inner = file_system(path)
    with _named(path, "read"):
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


def size(path: str) -> int:
    """A file's size in bytes.

    Raises:
        StorageError: The file is missing.
    """
    system, inner = file_system(path)
    with _named(path, "read"):
        return int(system.size(inner))


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file that is there whole and durable, or not at all.

    Locally: a temporary neighbour, fsync, rename. Elsewhere: one put, which object stores make atomic.

    Raises:
        StorageError: There is no right or no space to write.
    """
    with _named(path, "write"):
        if is_local(path):
            target = local_path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_dir(target.parent)
        else:
            system, inner = file_system(path)
            system.pipe_file(inner, data)


def write_text(path: str, text: str) -> None:
    """Writes a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str) -> Any:
    """A JSON file's value.

    Raises:
        StorageError: The file is missing or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise StorageError(f"{path} is not valid JSON: {error}") from error


@contextmanager
def new_dir(path: str) -> Iterator[Path]:
    """A local directory that appears at `path` only when the block ends well; what was there is replaced.

    Yields:
        A temporary neighbour to write into.

    Raises:
        StorageError: There is no right or no space to write.
    """
    target = local_path(path)
    with _named(path, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            if target.exists():
                retired = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
                target.rename(retired)
                temporary.rename(target)
                shutil.rmtree(retired)
            else:
                temporary.rename(target)
            _sync_dir(target.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def remove(path: str) -> None:
    """Removes a file if it is there."""
    with _named(path, "remove"):
        if is_local(path):
            local_path(path).unlink(missing_ok=True)
        else:
            system, inner = file_system(path)
            if system.exists(inner):
                system.rm_file(inner)


def fingerprint(value: Any) -> str:
    """A short content hash of a JSON-like value (keys in any order) or of bytes: 16 hexadecimal digits of SHA-256."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def file_fingerprint(path: str) -> str:
    """A content hash of a file, as `fingerprint` gives it, read in pieces.

    Raises:
        StorageError: The file is missing or unreadable.
    """
    system, inner = file_system(path)
    with _named(path, "read"), system.open(inner, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()[:16]


def _sync_dir(directory: Path) -> None:
    """Makes a rename in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
