"""Files, local or at any fsspec address (`s3://…`): what is read whole, and what is written at once or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import posixpath
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs

from merging.errors import MergequestError, StorageError
from merging.io.documents import MAX_BYTES, MAX_YAML_BYTES, as_object, parse_json, parse_yaml
from merging.io.secrets import holds_secret, redacted

T = TypeVar("T")
S3 = ("s3", "s3a")
SHOWN = 300
"""Characters of a path that is none, in a message."""
LONGEST_NAME = 255
"""Bytes of a file's name, on the file systems that there are."""
SETTLED = 2.0
"""Seconds after which a change of a local file shows in its times: file systems keep them no finer than that."""


def is_local(path: str) -> bool:
    """Whether `path` names this machine's file system."""
    return "://" not in path or path.startswith("file://")


def local_path(path: str) -> Path:
    """The local path that `path` names.

    Raises:
        StorageError: It is no path: it holds a NUL, half of a character, or a name that is too long.
    """
    try:
        encoded = os.fsencode(path)
        if b"\0" in encoded:
            raise StorageError(f"{path[:SHOWN]!r} is no path: it holds a NUL character")
        if len(encoded) > LONGEST_NAME and max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
            raise StorageError(f"{path[:SHOWN]} … is no path: a name in it has more than {LONGEST_NAME} bytes")
    except UnicodeEncodeError as error:
        raise StorageError(f"{path[:SHOWN]!r} is no path: it holds half of a character") from error
    return Path(path.removeprefix("file://"))


def expanded(path: str) -> Path:
    """The local path that `path` names, a `~` before it replaced by the home directory.

    Raises:
        StorageError: It is no path, or there is no such user.
    """
    try:
        return local_path(path).expanduser()
    except RuntimeError as error:
        raise StorageError(f"cannot find {path}: there is no such user's home directory on this machine") from error


def absolute(path: str) -> str:
    """`path` made independent of the working directory; addresses stay as they are.

    Raises:
        StorageError: It is no path, or there is no such user.
    """
    return str(expanded(path).absolute()) if is_local(path) else path


def join(path: str, *names: str) -> str:
    """`path` with `names` below it."""
    return posixpath.join(path, *names)


def base_name(path: str) -> str:
    """The last component of `path`."""
    return posixpath.basename(path.rstrip("/"))


def contains(directory: str, path: str) -> bool:
    """Whether `path` is `directory` or lies below it, whatever links and detours they are written with."""
    if is_local(directory) and is_local(path):
        outer, inner = (local_path(place).expanduser().resolve() for place in (directory, path))
        if outer.exists() and any(entry.exists() and outer.samefile(entry) for entry in (inner, *inner.parents)):
            return True
        return inner.is_relative_to(outer)
    if is_local(directory) or is_local(path):
        return False
    outer_key, inner_key = _key(directory), _key(path)
    return inner_key == outer_key or inner_key.startswith(outer_key.rstrip("/") + "/")


def _key(address: str) -> str:
    """An address in one of the ways in which it can be written."""
    protocol, _, rest = address.partition("://")
    protocol = {"s3a": "s3", "gcs": "gs"}.get(protocol.lower(), protocol.lower())
    return f"{protocol}://{posixpath.normpath('/' + rest).lstrip('/')}"


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
        system, inner = url_to_fs(str(local_path(path)) if is_local(path) else path)
    except (ImportError, ValueError) as error:
        told = redacted(str(error))
        raise StorageError(f"cannot open {path}: {told}. Is the package of that protocol installed?") from error
    except Exception as error:  # what a store's own client raises: no credentials, no account, …
        raise StorageError(f"cannot open {path}: {_in_words(error)}") from error
    return system, inner


@contextmanager
def _named(path: str, doing: str, *, client: bool = True) -> Iterator[None]:
    """Turns an operating system's or a server's error into one that names the path.

    Args:
        path: The file's path or address.
        doing: What is tried, for the message.
        client: Whether nothing but a store's client runs in the block. Clients raise errors of their own that are no
            `OSError` (gcsfs, adlfs, google-auth, aiohttp).
    """
    try:
        yield
    except MergequestError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"cannot {doing} {path}: it does not exist") from error
    except OSError as error:
        raise StorageError(f"cannot {doing} {path}: {redacted(str(error.strerror or error))}") from error
    except Exception as error:
        if is_local(path) or not client:
            raise
        raise StorageError(f"cannot {doing} {path}: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    """The type and the first line of a foreign error."""
    first = redacted((str(error).strip().splitlines() or [""])[0])
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


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


def require_files(path: str) -> None:
    """Looks whether all that a local directory holds, and the directories in it, can be read to an end.

    Libraries open files of a checkpoint by themselves, and would wait at a pipe for ever.

    Raises:
        StorageError: There is a pipe, socket or device.
    """
    if not is_local(path):
        return
    with _named(path, "list"):
        for entry in _entries(local_path(path)):
            mode = entry.stat().st_mode if entry.exists() else stat.S_IFREG
            if not stat.S_ISDIR(mode):
                _require_regular(str(entry), mode)


def _entries(directory: Path) -> Iterator[Path]:
    """What lies in a directory, and in those that lie in it."""
    for entry in directory.iterdir():
        yield entry
        if entry.is_dir():
            yield from entry.iterdir()


def exists(path: str) -> bool:
    """Whether there is a file or directory at `path`.

    Raises:
        StorageError: It is no path, its name is too long, or the server does not say.
    """
    if is_local(path):
        with _named(path, "look for"):
            return local_path(path).exists()
    system, inner = file_system(path)
    with _named(path, "look for"):
        return bool(system.exists(inner))


def is_dir(path: str) -> bool:
    """Whether there is a directory at `path`."""
    if is_local(path):
        with _named(path, "look for"):
            return local_path(path).is_dir()
    system, inner = file_system(path)
    with _named(path, "look for"):
        return bool(system.isdir(inner))


def list_dir(path: str) -> list[str]:
    """Sorted base names of what lies directly in `path`; empty where there is nothing."""
    if is_local(path):
        with _named(path, "list"):
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


def list_files(path: str, *, hidden: bool = True) -> dict[str, int]:
    """Every regular file below `path`, by its path relative to it, sorted, with its size in bytes.

    Links to files are files; links to directories are not followed, so that nothing is listed twice or for ever.

    Args:
        path: The directory.
        hidden: Whether local directories are looked into whose names begin with a dot.
    """
    if is_local(path):
        root = local_path(path)
        with _named(path, "list"):
            below: list[Path] = []
            for where, directories, names in os.walk(root):
                directories[:] = [name for name in directories if hidden or not name.startswith(".")]
                below += [Path(where) / name for name in names]
            return {str(file.relative_to(root)): file.stat().st_size for file in sorted(below) if file.is_file()}
    system, inner = file_system(path)
    with _named(path, "list"):
        system.invalidate_cache(inner)
        try:
            found = system.find(inner, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        root_name = inner.strip("/") + "/"
        below_root = {
            name.lstrip("/").removeprefix(root_name): int(info.get("size") or 0) for name, info in found.items()
        }
        return dict(sorted((name, size) for name, size in below_root.items() if name and not name.endswith("/")))


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
        StorageError: The file is missing or unreadable, or no file.
    """
    if is_local(path):
        with _named(path, "read"), _opened(path) as file:
            file.seek(start or 0)
            return _read_up_to(file, None if stop is None else max(stop - (start or 0), 0))
    system, inner = file_system(path)
    with _named(path, "read"):
        return bytes(system.cat_file(inner, start=start, end=stop))


def _read_up_to(file: BinaryIO, count: int | None) -> bytes:
    """So many bytes, or all: one call of the system reads 2 GiB at most."""
    if count is None:
        return file.read()
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
        StorageError: The file is missing, or no file.
    """
    if is_local(path):
        with _named(path, "read"):
            found = local_path(path).stat()
            _require_regular(path, found.st_mode)
            return found.st_size
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
    with _named(path, "write", client=False):
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
            with _named(path, "write"):
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
    _sync(target.parent)


def write_text(path: str, text: str) -> None:
    """Writes a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str) -> Any:
    """A JSON file's value.

    Raises:
        StorageError: The file is missing or not JSON, or beyond the bounds of `merging.io.documents`.
    """
    return parse_json(_read_bounded(path, MAX_BYTES), path)


def read_object(path: str) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        StorageError: As `read_json`; or it holds something else.
    """
    return as_object(read_json(path), path)


def read_yaml(path: str) -> Any:
    """A YAML file's value.

    Raises:
        StorageError: The file is missing or not YAML, or beyond the bounds of `merging.io.documents`.
    """
    try:
        return parse_yaml(_read_bounded(path, MAX_YAML_BYTES).decode(), path)
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is not a UTF-8 text file") from error


def read_as(path: str, build: Callable[[Any], T]) -> T:
    """What `build` makes of a JSON file's value.

    Args:
        path: The file, which the program itself wrote.
        build: Looks up and converts what it needs.

    Raises:
        StorageError: The file is missing or not JSON, or `build` finds that it is something else.
    """
    return made_from(read_json(path), build, path)


def made_from(value: Any, build: Callable[[Any], T], path: str) -> T:
    """What `build` makes of what a file holds.

    Raises:
        StorageError: It finds that it is something else.
    """
    try:
        return build(value)
    except (MergequestError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = str(error) if isinstance(error, MergequestError) else f"{type(error).__name__}: {error}"
        raise StorageError(f"{path} is damaged, or was not written by mergequest ({told[:300]})") from error


def _read_bounded(path: str, most: int) -> bytes:
    """A file's bytes, or so many of them that its size is seen to be too large."""
    return read_bytes(path, 0, min(size(path), most + 1) if is_local(path) else most + 1)


@contextmanager
def new_dir(path: str) -> Iterator[Path]:
    """A local directory that appears at `path` only when the block ends well; what was there is replaced.

    It is durable then, with all that lies in it. What processes that were killed left of the same directory goes.

    Yields:
        A temporary neighbour to write into.

    Raises:
        StorageError: There is no right or no space to write.
    """
    target = local_path(path).expanduser().resolve()
    with _named(path, "write", client=False):
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
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


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
    with _named(path, "read"), _open_any(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()[:16]


@contextmanager
def _open_any(path: str) -> Iterator[BinaryIO]:
    """A file to read, wherever it lies."""
    if is_local(path):
        with _opened(path) as file:
            yield file
        return
    system, inner = file_system(path)
    with system.open(inner, "rb") as file:
        yield file


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
