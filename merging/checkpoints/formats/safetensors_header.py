"""The header of a safetensors file, checked as strictly as the format's own reader does, and its integers as Python's."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from merging.errors import CheckpointError, StorageError
from merging.io.documents import as_object, is_count, parse_json

MAX_HEADER = 100_000_000
"""Bytes of a header, the format's own bound."""
MAX_TENSORS = 100_000
"""Of one file: the largest mixtures of experts have as many in hundreds of files."""
MAX_DIMENSIONS = 32
MAX_SHOWN = 200
"""Characters of a tensor's name in a message."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a header: bytes [start, stop) of what follows the header, and what they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(raw: bytes, body: int, path: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a header; together the tensors are the file's bytes, each of them once.

    Args:
        raw: The header, without its length.
        body: Number of bytes that follow it.
        path: The file, for messages.

    Returns:
        Metadata, and name → entry in the header's order.

    Raises:
        CheckpointError: It is no header, contradicts itself, or is not that of these bytes.
    """
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise CheckpointError(f"{path} has more than {MAX_TENSORS:,} tensors: no such file is read")
    try:
        header = as_object(parse_json(raw, f"the header of {path}", max_bytes=MAX_HEADER), f"the header of {path}")
    except StorageError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: its header's `__metadata__` is not texts by name")
    entries = {name: _entry(name, value, body, path) for name, value in header.items()}
    _require_complete(entries, body, path)
    return metadata, entries


def _entry(name: str, value: Any, body: int, path: str) -> Entry:
    shown = name[:MAX_SHOWN]
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path} is damaged: the header's entry of '{shown}' is not dtype, shape and offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: '{shown}' has dtype {str(dtype)[:MAX_SHOWN]!r}, which is not read. Where it belongs to quantised weights "
            "(F8_E8M0, F4, U32, …), dequantise them first, or take the checkpoint that they were quantised from"
        )
    for what, numbers in (("shape", shape), ("offsets", offsets)):
        if not isinstance(numbers, list) or not all(map(is_count, numbers)):
            raise CheckpointError(
                f"{path} is damaged: the {what} of '{shown}' are not whole numbers from 0 on ({str(numbers)[:MAX_SHOWN]})"
            )
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path} is damaged: '{shown}' has {len(shape):,} dimensions")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path} is damaged: '{shown}' has the offsets {str(offsets)[:MAX_SHOWN]}")
    start, stop = offsets
    if stop > body:
        raise CheckpointError(f"{path} is truncated: '{shown}' ends at byte {stop:,} of {body:,}: copy the file again")
    if prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise CheckpointError(
            f"{path} is damaged: '{shown}' has {stop - start:,} bytes, but {dtype} {str(shape)[:MAX_SHOWN]} has "
            f"{prod(shape) * DTYPES[dtype].itemsize:,}"
        )
    return Entry(DTYPES[dtype], tuple(shape), start, stop)


def _require_complete(entries: Mapping[str, Entry], body: int, path: str) -> None:
    """Every byte belongs to one tensor: else one of two readers of the file would see other weights than the other."""
    place, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < place:
            raise CheckpointError(
                f"{path} is damaged: '{name[:MAX_SHOWN]}' and '{before[:MAX_SHOWN]}' share bytes of the file"
            )
        if entry.start > place:
            raise CheckpointError(f"{path} is damaged: bytes {place:,} to {entry.start:,} belong to no tensor")
        place, before = entry.stop, name
    if place != body:
        raise CheckpointError(f"{path} is damaged: {body - place:,} bytes at its end belong to no tensor")
