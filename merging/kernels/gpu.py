"""Merges of stored weights on a GPU, each by one kernel that reads every number once, in Triton, which torch for CUDA brings.

The arithmetic is that of the compiled loops on a CPU (`merging.kernels.loops`), up to the order of sums, and random masks are
the same. What the kernels do not take, torch's own operations merge, in more passes.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from merging.kernels.cpu import Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(out: Tensor, *values: Tensor) -> bool:
    """Whether the kernels take these flat tensors, which are written and read: on a GPU, what is read of one dtype."""
    if not out.is_cuda or not values or out.dtype not in DTYPES or values[0].dtype not in DTYPES:
        return False
    alike = all(value.device == out.device and value.dtype == values[0].dtype for value in values)
    return alike and all(value.is_contiguous() for value in (out, *values)) and is_there(out.device)


@cache
def is_there(device: torch.device) -> bool:
    """Whether kernels can be made and run on a GPU; if they should be and cannot, a warning says why."""
    if find_spec("triton") is None:
        return False
    out = torch.zeros(1, device=device)
    try:
        weighted_sum([(torch.ones(1, device=device), 2.0)], out)
        return out.item() == 2.0
    except Exception as error:  # a compiler that is missing, a driver too old: Triton raises all kinds
        warnings.warn(
            f"Triton makes no kernels for {device} ({type(error).__name__}: {error}): torch's own operations merge there, "
            "in more passes",
            stacklevel=2,
        )
        return False


def weighted_sum(terms: Sequence[tuple[Tensor, float]], out: Tensor) -> None:
    """Writes Σ c_i x_i, flat tensors that fit, accumulated in float32 and rounded once."""
    from merging.kernels import triton_kernels as kernels

    values = [value for value, _ in terms]
    rows = _table([[value.data_ptr(), _bits(factor)] for value, factor in terms], out.device)
    kernels.launch_sum(rows, len(terms), values[0].dtype, out, aligned=_aligned(values))


def combine(base: Tensor, values: Sequence[Tensor], out: Tensor, rule: "Rule") -> None:
    """Merges the task vectors of members in one pass over flat tensors that fit.

    Args:
        base: θ_0 [n].
        values: θ_t [n] of every member.
        out: Overwritten [n].
        rule: The arithmetic.
    """
    from merging.kernels import triton_kernels as kernels

    factors, scale = rule.normalised()
    (keys, *_) = rule.keys or [(0, 0)]  # beside bounds, everybody's
    lines = []
    for number, (value, factor) in enumerate(zip(values, factors, strict=True)):
        line = [value.data_ptr(), _bits(factor)]
        if rule.bounds:
            bound = rule.bounds[number]
            line += [*map(_bits, (*bound.above, *bound.most)), bound.above_level, bound.most_level, *keys]
        elif rule.keys:
            line += rule.keys[number]
        lines.append(line)
    kernels.launch_combine(
        _table(lines, out.device),
        len(values),
        values[0].dtype,
        base,
        out,
        scale=scale,
        level=rule.level,
        offset=rule.offset,
        trimmed=bool(rule.bounds),
        entries=rule.entries,
        aligned=_aligned([base, *values]),
    )


def _table(lines: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """What a kernel must know of every row, int64 [T, columns]."""
    table = torch.tensor(lines, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _aligned(values: Sequence[Tensor]) -> bool:
    """Whether all rows begin where a GPU reads sixteen bytes at once."""
    return all(value.data_ptr() % 16 == 0 for value in values)


def _bits(number: float) -> int:
    """A float32 as a table has it."""
    return int(np.float32(number).view(np.int32))
