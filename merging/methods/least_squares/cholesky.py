"""Positive semi-definite systems, solved by Cholesky in float64, with a ridge only where one is needed."""

import torch
from torch import Tensor

from merging.errors import MethodError

PIVOT = 1e-12
"""A pivot below this share of its diagonal entry is rounding noise of float64: the matrix is singular."""
LEAST, MOST = 1e-10, 1e-3
"""The first and the largest share of the diagonal that is added to what does not factor."""
CLEAR = 1e-2
"""Pivots above this leave no doubt of the smallest eigenvalue."""
TRUSTED, ADDED = 2.0, 10.0
"""Times the norm of the entries' rounding errors: an eigenvalue below the first is one of them; the second outweighs them."""


def factor(matrices: Tensor, names: list[str], rounding: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factors of A + r·D, D = diag(A) (1 where that is 0), with a ridge r only where A alone is singular.

    The matrix is scaled to unit diagonal first: the ridge then means the same to inputs of any size. Where entries were
    rounded, to float32 say, the eigenvalues that are 0 become rounding errors of either sign, up to √n times as large as an
    entry's. A matrix whose smallest eigenvalue may be one is singular, whether or not a processor's Cholesky comes through it;
    and its ridge is large enough to outweigh them.

    Args:
        matrices: A [B, n, n] float64; overwritten.
        names: What each is called in an error message.
        rounding: Relative error of the entries (the machine epsilon of the dtype in which they were stored).

    Returns:
        Factors L of the scaled matrices [B, n, n], scales D^½ [B, n], ridges r [B].

    Raises:
        MethodError: No ridge of about 1e-3 of the diagonal helps: A is far from positive semi-definite.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    matrices.div_(scale[:, :, None]).div_(scale[:, None, :])
    ridges = torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    noise = rounding * matrices.shape[1] ** 0.5
    factors, info = torch.linalg.cholesky_ex(matrices)
    failed = _failed(factors, info, TRUSTED * noise)
    ridge = max(LEAST, ADDED * noise)
    most = max(MOST, ridge)
    while len(failed) and ridge <= most:
        again = matrices[failed]
        again.diagonal(dim1=1, dim2=2).add_(ridge)
        retried, info = torch.linalg.cholesky_ex(again)
        factors[failed], ridges[failed] = retried, ridge
        failed = failed[_failed(retried, info)]
        ridge *= 10.0
    if len(failed):
        raise MethodError(
            f"the weighted sum of Gram matrices of '{names[int(failed[0])]}' is not positive semi-definite: "
            "negative scaling factors cancel it, or a Gram is damaged. Use factors ≥ 0, factors = "
            "contribution, or compute it again"
        )
    return factors, scale, ridges


def _failed(factors: Tensor, info: Tensor, least: float = 0.0) -> Tensor:
    """Indices of the matrices that have no usable factor, or an eigenvalue that may be below `least`."""
    pivots = factors.diagonal(dim1=1, dim2=2).square().amin(dim=1)
    bad = (info != 0) | ~(pivots >= PIVOT)
    doubtful = (~bad & (pivots < CLEAR)).nonzero().squeeze(1) if least > 0 else pivots[:0].long()
    if len(doubtful):
        unit = torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device)
        inverse = torch.linalg.solve_triangular(factors[doubtful], unit, upper=False)
        # the trace of A⁻¹ is at least 1 / λ_min
        bad[doubtful] = inverse.square().sum(dim=(1, 2)) * least > 1
    return bad.nonzero().squeeze(1)


def solve(factors: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    """(A + r·D)⁻¹ B from what `factor` gave.

    Args:
        factors: [B, n, n] float64.
        scale: [B, n] float64.
        right: [B, n, m] float64; overwritten.
    """
    right.div_(scale[:, :, None])
    return torch.cholesky_solve(right, factors).div_(scale[:, :, None])
