"""When two ways to compute the same numbers disagree by more than rounding."""

import math

import torch
from torch import Tensor

RELATIVE = 3e-3
"""Share of its norm that a tensor may be off: some layers compute in float32, or TF32, whatever their weights are."""
RELATIVE_IN_16_BITS = 5e-2
FLOOR = 1e-2
"""Share of that share, of the largest tensor's norm, below which all is rounding (a key's bias has no gradient)."""


def differs(value: Tensor, expected: Tensor, largest: float = 0.0) -> bool:
    """Whether a tensor is not what it should be; of what is not finite nothing can be said, and it goes its way.

    Args:
        value: What was computed.
        expected: What it should be, in its own dtype's rounding.
        largest: The largest norm among the tensors that belong together.
    """
    relative = RELATIVE if torch.finfo(expected.dtype).bits > 16 else RELATIVE_IN_16_BITS
    norm = _norm(expected)
    if not math.isfinite(norm):
        return False
    return not _norm(value - expected) <= relative * max(norm, FLOOR * largest)


def probe_gradient(output: Tensor) -> Tensor:
    """A gradient for some logits that has another number for each."""
    return torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).view_as(output)


def _norm(value: Tensor) -> float:
    """In float64, without a copy of the tensor."""
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
