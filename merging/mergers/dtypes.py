"""In which dtype merged weights are held, sent and scored: that in which they will be exported."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from merging.checkpoints.formats.safetensors_file import TensorInfo
from merging.checkpoints.pool import Pool

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes of two bytes that checkpoints are stored in."""


def rounded_dtype(info: TensorInfo) -> torch.dtype:
    """What a merged weight is rounded to: 16 bits where the base stores it so, as an export does; else float32."""
    return info.dtype if info.dtype in HALVES else torch.float32


def model_dtype(pool: Pool) -> torch.dtype:
    """The dtype of a pool's live models: the one that most of the base's merged entries have, if it is of 16 bits.

    Where the base stores bfloat16 and float16 side by side, neither holds the other's values: float32.
    """
    entries: Counter[torch.dtype] = Counter()
    for info in pool.weights.values():
        entries[rounded_dtype(info)] += prod(info.shape)
    if all(entries[dtype] for dtype in HALVES):
        return torch.float32
    return entries.most_common(1)[0][0]


def merged_bytes(weights: Mapping[str, TensorInfo], names: Sequence[str]) -> int:
    """Bytes of some merged weights, each rounded to its own dtype."""
    return sum(prod(weights[name].shape) * rounded_dtype(weights[name]).itemsize for name in names)


def views(memory: Tensor, weights: Mapping[str, TensorInfo], names: Sequence[str]) -> dict[str, Tensor]:
    """Some merged weights one after another in the same memory, those of four bytes first.

    Args:
        memory: uint8 [`merged_bytes(weights, names)`].
        weights: The pool's.
        names: The base's names.

    Returns:
        The weights by name, in the names' order, each in its own dtype and shape.
    """
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: -rounded_dtype(weights[name]).itemsize):
        starts[name] = end
        end += merged_bytes(weights, [name])
    return {
        name: memory[starts[name] : starts[name] + merged_bytes(weights, [name])]
        .view(rounded_dtype(weights[name]))
        .view(weights[name].shape)
        for name in names
    }
