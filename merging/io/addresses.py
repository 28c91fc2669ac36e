"""Paths and fsspec addresses (`s3://…`): what they name, the file system that serves them, and its errors in words."""

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
from fsspec.core import url_to_fs
from fsspec.dircache import DirCache

from merging.errors import MergequestError, StorageError
from merging.io import hub
from merging.io.secrets import holds_secret, redacted

S3 = ("s3", "s3a")
ALIASES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
"""Protocols by other names, and the names that they are compared under."""


class Store(NamedTuple):
    """A store with a client of its own.

    Args:
        extra: Ours that installs the client.
        credentials: Where that looks for them.
    """

    extra: str
    credentials: str


STORES = {
    "abfs": Store(
        "azure",
        "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, "
        "AZURE_STORAGE_SAS_TOKEN or `az login`",
    ),
    "gs": Store(
        "gcs", "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine's own account"
    ),
}
DENIED = (401, 403)
SHOWN = 300
"""Characters of a path that is none, in a message."""
LONGEST_NAME = 255
"""Bytes of a file's name, on the file systems that there are."""


def is_local(path: str) -> bool:
    """Whether `path` names this machine's file system; what is on the Hub lies in its cache there."""
    return "://" not in path or path.startswith(("file://", hub.SCHEME))


def local_path(path: str) -> Path:
    """The local path that `path` names.

    Raises:
        StorageError: It is no path: it holds a NUL, half of a character, or a name that is too long; or it is an address on
            the Hub that cannot be had.
    """
    if hub.is_hub(path):
        return hub.local_path(path)
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
    return str(expanded(path).absolute()) if is_local(path) and not hub.is_hub(path) else path


def join(path: str, *names: str) -> str:
    """`path` with `names` below it."""
    return posixpath.join(path, *names)


def base_name(path: str) -> str:
    """The last component of `path`."""
    return posixpath.basename(path.rstrip("/"))


def contains(directory: str, path: str) -> bool:
    """Whether `path` is `directory` or lies below it, whatever links and detours they are written with."""
    if is_local(directory) and is_local(path):
        outer, inner = (expanded(place).resolve() for place in (directory, path))
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
    return f"{_plain(protocol)}://{posixpath.normpath('/' + rest).lstrip('/')}"


def _plain(protocol: str) -> str:
    """The one name of a protocol that has several."""
    return ALIASES.get(protocol.lower(), protocol.lower())


def _where_from(path: str) -> str:
    """Where a store's client looks for credentials, to be said after a refusal; empty where that is not known."""
    store = STORES.get(_plain(path.partition("://")[0]))
    return f". Its credentials come from {store.credentials}, on the driver and on every node" if store else ""


def _is_denied(error: Exception) -> bool:
    """Whether a client's error says that credentials are missing or wrong."""
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    return (str(status).isdigit() and int(str(status)) in DENIED) or "Credential" in type(error).__name__


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
    except ImportError as error:
        store = STORES.get(_plain(protocol))
        remedy = f": pip install 'mergequest[{store.extra}]'" if store else ""
        raise StorageError(
            f"cannot open {path}: a package is not installed here ({redacted(str(error))}){remedy}"
        ) from error
    except Exception as error:  # what a store's own client raises: no credentials, no account, …
        if (last := protocol.rpartition("::")[2]) not in fsspec.available_protocols():
            raise StorageError(f"cannot open {path}: there is no protocol '{last}'") from error
        raise StorageError(f"cannot open {path}: {in_words(error)}{_where_from(path)}") from error
    if isinstance(listings := getattr(system, "dircache", None), DirCache):
        listings.use_listings_cache = False  # else what another process writes is not seen, for ever
        listings.clear()
    return system, inner


@contextmanager
def named(path: str, doing: str, *, client: bool = True) -> Iterator[None]:
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
        is_denied = not is_local(path) and str(error).startswith("Forbidden")  # as gcsfs has it
        denied = _where_from(path) if is_denied else ""
        raise StorageError(f"cannot {doing} {path}: {redacted(str(error.strerror or error))}{denied}") from error
    except Exception as error:
        if is_local(path) or not client:
            raise
        denied = _where_from(path) if _is_denied(error) else ""
        raise StorageError(f"cannot {doing} {path}: {in_words(error)}{denied}") from error


def in_words(error: Exception) -> str:
    """The type and the first line of a foreign error."""
    first = redacted((str(error).strip().splitlines() or [""])[0])
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
