"""Short content hashes: what caches, identities and provenance go by."""

import hashlib
import json
from typing import Any

from merging.io.addresses import named
from merging.io.storage import open_to_read


def fingerprint(value: Any) -> str:
    """A short content hash of a JSON-like value (keys in any order) or of bytes: 16 hexadecimal digits of SHA-256."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def file_fingerprint(path: str) -> str:
    """A content hash of a file, as `fingerprint` gives it, read in pieces.

    Raises:
        StorageError: The file is missing or unreadable.
    """
    with named(path, "read"), open_to_read(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()[:16]
