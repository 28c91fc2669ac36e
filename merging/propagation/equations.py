"""Least squares for layers that share an input: sums over examples, and their solution."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merging.methods.least_squares.cholesky import factor, solve


class Equations:
    """Sums over rows of what layers read (X̂, with a last column of ones where they have biases) and still miss (E).

    Products are taken in the rows' dtype and summed in float64.

    Args:
        device: Where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = 0
        self._sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(4)]

    def update(self, read: Tensor, missed: Tensor, wanted: Tensor) -> None:
        """Adds rows: X̂ [rows, in], E [rows, out], and Y [rows, out], what the layers should put out."""
        parts = (read.T @ read, read.T @ missed, missed.square().sum(), wanted.square().sum())
        self._sums = [total + part.to(torch.float64) for total, part in zip(self._sums, parts, strict=True)]
        self.rows += len(read)

    def add(self, other: "Equations") -> None:
        """Adds the other's sums."""
        parts = other.to(self._sums[0].device)._sums
        self._sums = [total + part for total, part in zip(self._sums, parts, strict=True)]
        self.rows += other.rows

    def add_mean(self, other: "Equations", factor: float = 1.0) -> None:
        """Adds `factor` times the other's means over its rows, so that members count alike, however long their data."""
        scale = factor / max(other.rows, 1)
        self._sums = [total + scale * part for total, part in zip(self._sums, other._sums, strict=True)]
        self.rows += other.rows

    def to(self, device: str | torch.device) -> "Equations":
        """The same on another device."""
        moved = Equations(torch.device(device))
        moved._sums, moved.rows = [total.to(device) for total in self._sums], self.rows
        return moved

    @property
    def finite(self) -> bool:
        """Whether all sums are finite numbers."""
        return all(bool(total.isfinite().all()) for total in self._sums)

    def solve(self, ridge: float, biased: bool, name: str) -> "LeastSquaresUpdate":
        """Minimises ‖X̂ Δ − E‖² + λ ‖Δ‖², λ = ridge × the mean of diag(X̂ᵀX̂); a bias is not held back.

        Args:
            ridge: ≥ 0; at 0 a singular sum gets the smallest ridge that factors.
            biased: Whether the last column of X̂ is ones.
            name: The first layer's weight, for an error message.

        Raises:
            MethodError: The sums are not positive semi-definite.
        """
        gram, right, missed, wanted = self._sums
        matrix = gram.clone()
        diagonal = matrix.diagonal()[: len(gram) - biased]
        diagonal += ridge * diagonal.mean()
        factors, scale, added = factor(matrix[None], [name])
        delta = solve(factors, scale, right.clone()[None])[0]
        left = missed - ((2 * right - gram @ delta) * delta).sum()
        before, after = (float(part.clamp_min(0) / wanted.clamp_min(1e-30)) for part in (missed, left))
        return LeastSquaresUpdate(delta, before, after, float(added[0]))


@dataclass(frozen=True)
class LeastSquaresUpdate:
    """What least squares found.

    Args:
        delta: What to add to the layers' mean weights, transposed [in, out], with the biases in the last row.
        before: ‖E‖² / ‖Y‖² of the mean weights.
        after: The same once `delta` is added.
        added: Share of the diagonal that had to be added to make the sums solvable.
    """

    delta: Tensor
    before: float
    after: float
    added: float

    def to(self, device: str | torch.device) -> "LeastSquaresUpdate":
        """The same on another device."""
        return replace(self, delta=self.delta.to(device))
