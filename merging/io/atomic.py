"""Files and directories that are there whole and durable, or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from merging.io.addresses import S3, expanded, file_system, is_local, local_path, named
from merging.io.process import try_lock
from merging.io.storage import exists, read_bytes


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
    with named(path, "write", client=False):
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
            with named(path, "write"):
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
    with named(path, "write"):
        system.pipe_file(inner, data)


def write_text(path: str, text: str) -> None:
    """Writes a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def create(path: str, data: bytes) -> bool:
    """Writes a file as `write_bytes` does, unless there is one: of several writers at once, one wins.

    An object store that honours conditional puts (`If-None-Match: *`) decides it. With one that does not, writers in
    the same instant may all be told that they won; what is there is whole in any case.

    Returns:
        Whether the file holds `data`; False where something else was there.

    Raises:
        StorageError: There is no right or no space to write.
    """
    with named(path, "write"):
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


@contextmanager
def new_dir(path: str) -> Iterator[Path]:
    """A local directory that appears at `path` only when the block ends well; what was there is replaced.

    It is durable then, with all that lies in it. What processes that were killed left of the same directory goes.

    Yields:
        A temporary neighbour to write into.

    Raises:
        StorageError: There is no right or no space to write.
    """
    target = expanded(path).resolve()
    with named(path, "write", client=False):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        temporary, handle = _claimed(target)
        try:
            yield temporary
            _sync_tree(temporary)
            if target.exists():
                retired = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
                target.rename(retired)
                temporary.rename(target)
                shutil.rmtree(retired)
            else:
                temporary.rename(target)
            _sync(target.parent)
        finally:
            os.close(handle)
            if temporary.exists():
                shutil.rmtree(temporary)


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
    _sync(target.parent)


def _claimed(target: Path) -> tuple[Path, int]:
    """A new directory beside `target`, and an open handle whose lock says that its process lives."""
    while True:
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        try:
            handle = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # taken for a dead process's before it was locked
            continue
        with suppress(OSError):  # a file system without locks: then nobody cleans up, either
            fcntl.flock(handle, fcntl.LOCK_SH)
        if temporary.exists():
            return temporary, handle
        os.close(handle)


def _clean_up(target: Path) -> None:
    """Removes what killed processes left of a directory; one that was about to be replaced comes back."""
    leftover = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    left = [entry for entry in target.parent.iterdir() if leftover.fullmatch(entry.name) and entry.is_dir()]
    for entry in left:
        if entry.suffix == ".old" and not target.exists():
            entry.rename(target)
        elif not entry.is_symlink() and _is_abandoned(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _is_abandoned(directory: Path) -> bool:
    """Whether no living process holds its lock; False where nobody can tell."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        return try_lock(handle) == "held"
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    """Makes every file below a directory durable, and the directories themselves."""
    for where, _, names in os.walk(directory):
        for name in names:
            _sync(Path(where) / name)
        _sync(Path(where))


def _sync(path: Path) -> None:
    """Makes a rename in a directory durable, or the content of a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
