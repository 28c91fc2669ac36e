"""Models of the Hugging Face Hub, `hf://ORG/NAME@REVISION`: directories of its cache, downloaded when first read."""

import os
import re
import threading
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from merging.errors import StorageError
from merging.io.secrets import redacted

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._%-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
UNREAD = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.tflite",
)
UNREAD_FOLDERS = ("onnx/*", "openvino/*", "coreml/*", "original/*", "runs/*", "checkpoint-*/*")
"""What a repository may hold besides a model that is read here: other formats of it, and its training."""
_lock = threading.Lock()


def is_hub(path: str) -> bool:
    """Whether a path is an address on the Hub, or lies below one."""
    return path.startswith(SCHEME)


def is_id(text: str) -> bool:
    """Whether a text could be a model's id on the Hub, `ORG/NAME` or `ORG/NAME@REVISION`, as well as a path."""
    return _ID.fullmatch(text) is not None


def local_path(address: str) -> Path:
    """The place in the Hub's cache on this machine of what an address names, downloaded if it is not there.

    Raises:
        StorageError: It is no address of the Hub's, there is no such model, or it cannot be had from here.
    """
    repository, revision, below = _parts(address)
    with _lock:
        return _snapshot(repository, revision) / below if below else _snapshot(repository, revision)


def pinned(path: str) -> str:
    """A checkpoint's path with the commit that a Hub address stands for now, in both parts of `MODEL+ADAPTER`.

    Paths that are not on the Hub stay as they are.

    Raises:
        StorageError: As `local_path`.
    """
    if SCHEME not in path:
        return path
    if "+" in path:
        return "+".join(pinned(part) for part in path.split("+"))
    repository, revision, below = _parts(path)
    with _lock:
        commit = _snapshot(repository, revision).name
    return f"{SCHEME}{repository}@{commit}" + (f"/{below}" if below else "")


def _parts(address: str) -> tuple[str, str | None, str]:
    """Repository, revision, and the path below it."""
    organisation, _, rest = address.removeprefix(SCHEME).partition("/")
    name, _, below = rest.partition("/")
    match = _ID.fullmatch(f"{organisation}/{name}")
    if match is None or ".." in below.split("/"):
        raise StorageError(f"'{address}' is no model on the Hub: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return match[1], match[2] and match[2].replace("%2F", "/"), below


@cache
def _snapshot(repository: str, revision: str | None) -> Path:
    """The directory of a revision in the cache, complete."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    try:
        # `hf_transfer` and Xet are the user's choice, as are endpoint, cache, token and offline mode: by the environment
        place = Path(snapshot_download(repository, revision=revision, ignore_patterns=[*UNREAD, *UNREAD_FOLDERS]))
    except Exception as error:  # of the library, of its client, of the disk
        _refuse(repository, revision, error)
    if not _COMMIT.fullmatch(place.name):
        raise StorageError(f"the Hub's cache has {repository} at {place}, which names no commit: remove that directory")
    if not any(place.rglob("*.safetensors")):
        raise StorageError(
            f"{repository} on the Hub holds no safetensors: download it (`hf download {repository} --local-dir DIR`), and "
            "`mergequest convert DIR --out NEW` writes what a pickle holds as safetensors"
        )
    return place


def _refuse(repository: str, revision: str | None, error: Exception) -> NoReturn:
    """Raises what went wrong with the Hub as one error that says what to do.

    Raises:
        StorageError: Always.
    """
    from huggingface_hub import errors

    causes: list[Any] = [error, error.__cause__, error.__context__]
    name = repository + (f"@{revision}" if revision else "")

    def caused(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused(errors.GatedRepoError):
        why = "it is gated: accept its terms on its page, and give a token that may read it (HF_TOKEN, or `hf auth login`)"
    elif caused(errors.RevisionNotFoundError):
        why = f"it has no revision '{revision or 'main'}': name a branch, tag or commit of it"
    elif caused(errors.RepositoryNotFoundError):
        why = "there is no such model, or it is private and HF_TOKEN may not read it"
    elif caused(errors.OfflineModeIsEnabled) or (offline() and caused(errors.LocalEntryNotFoundError)):
        why = (
            "HF_HUB_OFFLINE is set, and the cache has it not or not whole: unset it once, or `hf download` it where there is a "
            "network"
        )
    elif caused(errors.LocalEntryNotFoundError) or type(error).__module__.startswith("httpx"):
        why = "the Hub cannot be reached, and the cache has it not or not whole: `hf download` it where there is a network"
    else:
        why = redacted(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    raise StorageError(
        f"'{name}' is no directory here (paths are relative to the file), and of the Hub: {why}"
    ) from error


def offline() -> bool:
    """Whether the user keeps the Hub's library off the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
