"""Positive semi-definite systems, solved by Cholesky in float64, with a ridge only where one is needed."""

import torch
from torch import Tensor

from merging.errors import MethodError

PIVOT = 1e-12
"""A pivot below this share of its diagonal entry is rounding noise of float64: the matrix is singular."""
RIDGES = tuple(10.0**exponent for exponent in range(-10, -2))
"""Shares of the diagonal that are added in turn until the matrix factors."""


def factor(matrices: Tensor, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factors of A + r·D, D = diag(A) (1 where that is 0), with the smallest ridge r that factors.

    The matrix is scaled to unit diagonal first: the ridge then means the same to inputs of any size.

    Args:
        matrices: A [B, n, n] float64; overwritten.
        names: What each is called in an error message.

    Returns:
        Factors L of the scaled matrices [B, n, n], scales D^½ [B, n], ridges r [B].

    Raises:
        MethodError: No ridge up to 1e-3 of the diagonal helps: A is far from positive semi-definite.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    matrices.div_(scale[:, :, None]).div_(scale[:, None, :])
    ridges = torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    factors, info = torch.linalg.cholesky_ex(matrices)
    failed = _failed(factors, info)
    for ridge in RIDGES:
        if not len(failed):
            break
        again = matrices[failed]
        again.diagonal(dim1=1, dim2=2).add_(ridge)
        retried, info = torch.linalg.cholesky_ex(again)
        factors[failed], ridges[failed] = retried, ridge
        failed = failed[_failed(retried, info)]
    if len(failed):
        raise MethodError(
            f"the weighted sum of Gram matrices of '{names[int(failed[0])]}' is not positive semi-definite: "
            "negative scaling factors cancel it, or a Gram is damaged. Use factors ≥ 0, factors = "
            "contribution, or compute it again"
        )
    return factors, scale, ridges


def _failed(factors: Tensor, info: Tensor) -> Tensor:
    """Indices of the matrices that have no usable factor."""
    pivots = factors.diagonal(dim1=1, dim2=2).square().amin(dim=1)
    return ((info != 0) | ~(pivots >= PIVOT)).nonzero().squeeze(1)


def solve(factors: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    """(A + r·D)⁻¹ B from what `factor` gave.

    Args:
        factors: [B, n, n] float64.
        scale: [B, n] float64.
        right: [B, n, m] float64; overwritten.
    """
    right.div_(scale[:, :, None])
    return torch.cholesky_solve(right, factors).div_(scale[:, :, None])
