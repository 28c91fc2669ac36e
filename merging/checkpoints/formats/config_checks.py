"""What a `config.json` must not say, whatever its architecture: transformers would build it, however long that takes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from merging.errors import CheckpointError

MAX_COUNT = 1 << 31
"""Of any number of units, tokens, or positions."""
MAX_EXPERTS = 1 << 16
MAX_CLASSES = 1 << 20
FEW_LAYERS = 256
"""Layers that are built in a moment; of more, each must have a tensor at least."""
IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)
MODEL_TYPE = re.compile(r"[\w.-]+\Z")
LAYERS = re.compile(r"(.*_)?(num|n)_(.*_)?layers?|(encoder|decoder)_layers|depths?|num_hidden_groups")
EXPERTS = re.compile(r".*experts?")
CLASSES = re.compile(r"(.*_)?num_(labels|classes)")
COUNTS = re.compile(r"(num|n)_.*|.*_(size|dim|heads|length|positions|embeddings|rank)|d_(model|ff|kv|inner|state)")


def check_config(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Looks for wrong types and absurd numbers in a configuration and those within it.

    Args:
        config: `config.json`.
        tensors: Number of tensors of the checkpoint.
        where: The file, for messages.

    Raises:
        CheckpointError: There is one, named by its key.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) and IDENTIFIER.match(name) for name in architectures
    ):
        raise _error(where, "architectures", architectures, "a list of names of classes")
    kind = config.get("model_type")
    if kind is not None and not (isinstance(kind, str) and MODEL_TYPE.match(kind)):
        raise _error(where, "model_type", kind, "a name")
    for name in ("id2label", "label2id"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise _error(where, name, config[name], "a mapping")
    for path, value in _numbers(config):
        most = _most(path.rpartition(".")[2], tensors)
        if most is not None and not -1 <= value <= most:  # −1 stands for a default in some
            raise _error(where, path, value, f"a number up to {most:,}")


def _most(key: str, tensors: int) -> int | None:
    """The largest value of a key; None where any will do."""
    if CLASSES.fullmatch(key):
        return MAX_CLASSES
    if EXPERTS.fullmatch(key):
        return MAX_EXPERTS
    if LAYERS.fullmatch(key):
        return max(FEW_LAYERS, tensors)
    return MAX_COUNT if COUNTS.fullmatch(key) else None


def _numbers(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a configuration and those within it, with its key; of a list, all under the list's."""
    for key, value in config.items():
        path = f"{above}{key}"
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}.")
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                if isinstance(value, list):
                    yield from _numbers(entry, f"{path}.")
            elif isinstance(entry, int | float) and not isinstance(entry, bool):
                yield path, entry


def _error(where: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{where}: `{key}` is {str(value)[:100]!r}, where {expected} is expected: copy it again")
