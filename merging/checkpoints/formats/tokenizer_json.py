"""A `tokenizer.json`: which row of the embeddings each token has, and the file with further tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging.errors import PoolError, StorageError
from merging.io import addresses, documents, storage

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
BY_WORDS = ("WordLevel", "WordPiece")
"""Kinds of tokenizer whose vocabulary is all that they are made of."""


@dataclass(frozen=True)
class Tokens:
    """A checkpoint's tokenizer.

    Args:
        ids: Token → its row.
        added: Token → its entry among the tokens that were added to the tokenizer's model.
        kind: The kind of that model.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str


def tokenizer_bytes(path: str) -> bytes | None:
    """A checkpoint's `tokenizer.json`; None where there is none.

    Raises:
        PoolError: It cannot be read.
    """
    if TOKENIZER_JSON not in storage.list_dir(path):
        return None
    try:
        return storage.read_bytes(addresses.join(path, TOKENIZER_JSON))
    except StorageError as error:
        raise PoolError(str(error)) from error


def read_tokens(path: str) -> Tokens | None:
    """The tokens of a checkpoint; None where it has no `tokenizer.json`.

    Raises:
        PoolError: It cannot be read or understood.
    """
    return parse_tokens(path, tokenizer_bytes(path))


def parse_tokens(path: str, raw: bytes | None) -> Tokens | None:
    """The tokens of a `tokenizer.json`; of a model made of scored words (unigram), their order gives the rows.

    Args:
        path: The checkpoint, for messages.
        raw: The file's content; None where there is none.

    Raises:
        PoolError: It cannot be understood.
    """
    if raw is None:
        return None
    where = addresses.join(path, TOKENIZER_JSON)
    try:
        value = documents.parse_json(raw, where)
        model = value["model"]
        vocab = model["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {token: row for row, (token, _) in enumerate(vocab)}
        added = {entry["content"]: entry for entry in value.get("added_tokens") or []}
        ids |= {token: entry["id"] for token, entry in added.items()}
        if not all(isinstance(token, str) and documents.is_count(row) for token, row in ids.items()):
            raise TypeError("a token is no text, or its row no number")
    except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PoolError(f"{where} is no tokenizer that can be read ({error!r}): save it again") from error
    return Tokens(ids, added, str(model.get("type")))


def with_tokens(
    path: str,
    ours: Tokens,
    added: Mapping[str, tuple[str, int]],
    tokens: Mapping[str, Tokens | None],
    first: int,
) -> dict[str, bytes]:
    """The base's tokenizer files with further tokens.

    Args:
        path: The base's directory.
        ours: Its tokens.
        added: Token to be added → the member that has it and its row there, in the order of their new rows.
        tokens: Each member's tokens.
        first: The row of the first.

    Returns:
        File name → content, of those that change.

    Raises:
        PoolError: A token belongs to a tokenizer's model, and not to what was added to it.
    """
    value = documents.read_json(addresses.join(path, TOKENIZER_JSON))
    entries = {}
    for row, (token, (who, _)) in enumerate(added.items(), first):
        theirs = tokens[who]
        entry = theirs.added.get(token) if theirs is not None else None
        if entry is not None:
            entries[row] = {**entry, "id": row}
        elif ours.kind in BY_WORDS:
            value["model"]["vocab"][token] = row
        else:
            raise PoolError(
                f"`vocabulary: union`: {who}'s token {token!r} is part of its {theirs.kind if theirs else ''} model, which "
                "cannot be joined with the base's: only added tokens can. Leave that member out, or set `vocabulary: base`"
            )
    value["added_tokens"] = [*(value.get("added_tokens") or []), *entries.values()]
    files = {TOKENIZER_JSON: json.dumps(value, indent=2, ensure_ascii=False).encode()}
    if entries and TOKENIZER_CONFIG in storage.list_dir(path):
        settings = documents.read_json(addresses.join(path, TOKENIZER_CONFIG))
        if isinstance(settings, dict) and isinstance(settings.get("added_tokens_decoder"), dict):
            settings["added_tokens_decoder"] |= {
                str(row): {key: value for key, value in entry.items() if key != "id"} for row, entry in entries.items()
            }
            files[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files
