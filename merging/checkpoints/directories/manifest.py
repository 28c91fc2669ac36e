"""What a merge wrote into a directory, so that the next one there replaces that and nothing else."""

import json
from collections.abc import Mapping

from merging.errors import StorageError
from merging.io import addresses, documents, hashing, storage

MANIFEST = ".mergequest.json"
"""The list of files that a merge wrote."""


def manifest(sizes: Mapping[str, int], contents: Mapping[str, bytes]) -> bytes:
    """The manifest of a directory to be written.

    Args:
        sizes: Weight file → bytes.
        contents: Any other file, by its path below the directory → what it will hold.
    """
    files: dict[str, object] = dict(sizes)
    files |= {name: hashing.fingerprint(content) for name, content in contents.items()}
    return (json.dumps({"version": 1, "files": files}, indent=1) + "\n").encode()


def written(path: str) -> dict[str, int | str]:
    """Files that the last merge into a directory wrote, or was about to; weights by size, the others by content hash."""
    try:
        files = documents.read_json(addresses.join(path, MANIFEST))["files"]
        return {str(name): record for name, record in files.items() if isinstance(record, int | str)}
    except (StorageError, KeyError, TypeError, AttributeError):
        return {}


def strangers(path: str) -> list[str]:
    """Files in a directory that no merge wrote, or that somebody changed since: they would be lost with it."""
    there = storage.list_dir(path)
    if MANIFEST not in there:
        return there
    known = written(path)
    return [
        name
        for name, size in storage.list_files(path).items()
        if name != MANIFEST and not _is_ours(path, name, size, known)
    ]


def require_replaceable(path: str) -> None:
    """Looks whether a merge may be written to a directory: it is empty, missing, or holds what a merge wrote.

    Raises:
        StorageError: It holds something else, or a link leads elsewhere.
    """
    if lost := strangers(path):
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise StorageError(
            f"{path} is not empty and holds no earlier merge alone ({shown} would be lost): name another directory, or "
            "move these files away"
        )


def _is_ours(path: str, name: str, size: int, known: Mapping[str, int | str]) -> bool:
    record = known.get(name)
    if isinstance(record, int):
        return size <= record  # less of it where the merge was killed
    return record is not None and record == hashing.file_fingerprint(addresses.join(path, name))
