"""Files, local or at any fsspec address (`s3://…`): what is read whole, and what is written at once or not at all."""

import errno
import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs

from merging.errors import StorageError

S3 = ("s3", "s3a")
SECRET = re.compile(
    r"^[^/@]*:[^/@]*@|[?&](X-Amz-Signature|X-Amz-Credential|sig|signature|token|secret)=", re.IGNORECASE
)
"""What an address must not hold: `user:password@`, or a signature in its query."""
SETTLED = 2.0
"""Seconds after which a change of a local file shows in its times: file systems keep them no finer than that."""


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


def holds_secret(address: str) -> bool:
    """Whether an address holds a password or a signature, which must not be shown or saved."""
    return SECRET.search(address.partition("://")[2]) is not None


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that serves `path`, and the path within it.

    Raises:
        StorageError: The protocol is unknown, its package is not installed, or the address holds a secret.
    """
    protocol, _, rest = path.partition("://")
    if holds_secret(path):
        raise StorageError(
            f"an address of protocol '{protocol}' holds a password or signature, which would be saved with the campaign: "
            "leave it out, and give credentials by the environment or the protocol's own configuration file"
        )
    if rest and protocol in S3:
        from merging.io.s3 import PatientS3  # half a second that only S3's users should wait

        return PatientS3(), rest
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
        try:
            found = system.ls(inner, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({base_name(entry) for entry in found} - {base_name(inner), ""})


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


def checksum(path: str) -> str:
    """What tells a file's contents from others without reading it; empty where nothing does.

    Of a remote file, what its server keeps. Of a local one, number, size and times, once these are old enough that
    another write must change them.

    Raises:
        StorageError: The file is missing.
    """
    if is_local(path):
        with _named(path, "read"):
            found = local_path(path).stat()
        if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED:
            return ""
        return f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    system, inner = file_system(path)
    with _named(path, "read"):
        info = system.info(inner)
    return str(info.get("ETag") or info.get("md5Hash") or info.get("checksum") or "")


@contextmanager
def open_new(path: str) -> Iterator[BinaryIO]:
    """A file to write from beginning to end, there whole and durable once the block ends well, else not at all.

    Locally: a temporary neighbour, fsync, rename. On S3: a multipart upload, completed at the end, or aborted so that
    no part of it is left. Elsewhere: a local temporary file, sent at the end. What was at `path` stays until then.

    Yields:
        The file; it can be written and told its position, neither read nor moved in.

    Raises:
        StorageError: There is no right or no space to write.
    """
    with _named(path, "write"):
        if is_local(path):
            with _new_neighbour(local_path(path)) as temporary, temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(local_path(path))
            return
        system, inner = file_system(path)
        if path.partition("://")[0] in S3:
            from merging.io.s3 import Upload

            upload = Upload(system, inner)
            try:
                yield cast(BinaryIO, upload)
                upload.commit()
            except BaseException:
                upload.abort()
                raise
            return
        with tempfile.NamedTemporaryFile() as spool:
            yield cast(BinaryIO, spool)
            spool.flush()
            system.put_file(spool.name, inner)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file that is there whole and durable, or not at all, as `open_new` does.

    Raises:
        StorageError: There is no right or no space to write.
    """
    if is_local(path):
        with open_new(path) as file:
            file.write(data)
        return
    system, inner = file_system(path)
    with _named(path, "write"):
        system.pipe_file(inner, data)


def create(path: str, data: bytes) -> bool:
    """Writes a file as `write_bytes` does, unless there is one: of several writers at once, one wins.

    An object store that honours conditional puts (`If-None-Match: *`) decides it. With one that does not, writers in
    the same instant may all be told that they won; what is there is whole in any case.

    Returns:
        Whether the file holds `data`; False where something else was there.

    Raises:
        StorageError: There is no right or no space to write.
    """
    with _named(path, "write"):
        try:
            if is_local(path):
                with _new_neighbour(local_path(path)) as temporary:
                    with temporary.open("wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    _link(temporary, local_path(path))
                return True
            if not exists(path):
                system, inner = file_system(path)
                try:
                    system.pipe_file(inner, data, mode="create")
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    system.pipe_file(inner, data)  # a server that refuses conditions
                return True
        except FileExistsError:
            pass  # or there by an earlier try of this very put, whose answer was lost
        return read_bytes(path) == data


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name unless that is taken; on a file system without links, its only name."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or target.exists():
            raise
        source.rename(target)


@contextmanager
def _new_neighbour(target: Path) -> Iterator[Path]:
    """A name beside `target` for what shall get its place, gone after the block; then the directory is durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    _sync_dir(target.parent)


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
