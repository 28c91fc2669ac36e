"""Conjugate gradients for many systems at once, without a word to the host between its steps."""

from collections.abc import Callable

import torch
from torch import Tensor

CHECK = 16
"""Steps after which it is looked whether all systems are solved."""


def solve(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    iterations: int,
    tolerance: float,
    precondition: Callable[[Tensor], Tensor] = lambda value: value,
    project: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps towards A x = b, from a start, for B systems (Hestenes and Stiefel 1952).

    A system rests as soon as its residual is below the tolerance, or its direction has no curvature.

    Args:
        apply: The symmetric operator A on [B, m, n].
        right: b [B, m, n].
        start: x to begin at [B, m, n].
        iterations: Most steps.
        tolerance: Of ‖A x − b‖ / ‖b‖.
        precondition: M⁻¹ on [B, m, n], with M symmetric, positive definite and near A.
        project: Takes out of directions what is known not to be in A's range.

    Returns:
        x [B, m, n], ‖A x − b‖ / ‖b‖ [B], and whether negative curvature was met [B].
    """
    value = start.clone()
    residual = project(right - apply(value))
    goal = _dot(right, right).clamp(min=torch.finfo(right.dtype).tiny)
    scaled = project(precondition(residual))
    direction = scaled.clone()
    power = _dot(residual, scaled)
    indefinite = torch.zeros(len(right), dtype=torch.bool, device=right.device)
    for step in range(iterations):
        active = _dot(residual, residual) > goal * tolerance**2
        if step % CHECK == 0 and not active.any():
            break
        applied = apply(direction)
        curvature = _dot(direction, applied)
        indefinite |= active & (curvature < 0)
        active &= curvature > 0
        length = torch.where(active, power / torch.where(active, curvature, 1.0), 0.0)[:, None, None]
        value += length * direction
        residual -= project(length * applied)
        scaled = project(precondition(residual))
        renewed = _dot(residual, scaled)
        ratio = torch.where(active & (power > 0), renewed / torch.where(power > 0, power, 1.0), 0.0)
        direction = scaled + ratio[:, None, None] * direction
        power = renewed
    left = right - apply(value)
    return value, (_dot(left, left) / goal).sqrt(), indefinite


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of B systems [B]."""
    return (first * second).sum(dim=(1, 2))
