"""A member's task parameter subspace as a symmetric positive semi-definite operator on a weight, many weights at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.gram_sketch import dense, diagonal
from merging.methods.checks import statistic
from merging.methods.least_squares.gram_systems import matrix
from merging.methods.method import Weight

KINDS: Mapping[str, tuple[str, ...]] = {
    "identity": (),
    "fisher": ("fisher",),
    "gram": ("gram",),
    "kfac": ("gram", "output_gram"),
}
"""Subspace → the statistics that define it."""


def has_statistics(weight: Weight, subspace: str) -> bool:
    """Whether a weight has what the subspace needs."""
    return all(weight.statistics.get(kind) for kind in KINDS[subspace])


def check_statistics(weight: Weight) -> None:
    """Looks at every statistic that some subspace uses.

    Raises:
        MethodError: One is missing for a member, not finite, negative where it cannot be, or of another shape.
    """
    statistic(weight, "fisher", weight.base.shape, nonnegative=True)
    sides = list(matrix(weight.base, weight.transposed).shape) if weight.base.dim() == 2 else []
    for kind, side in (("gram", -1), ("output_gram", 0)):
        if not weight.statistics.get(kind):
            continue
        if not sides:
            raise MethodError(f"'{weight.name}' has shape {list(weight.base.shape)} and a {kind}: only matrices can")
        for member, value in statistic(weight, kind, (sides[side], sides[side]), nonnegative=False).items():
            if (low := diagonal(value).min().item()) < 0:
                raise MethodError(
                    f"{member}: {kind} of '{weight.name}' has a negative diagonal ({low:g}). Compute the {kind} statistic "
                    "of this member again"
                )


SMALL = 1024
"""Largest side of K-FAC's factors whose range is found by eigenvalues; conjugate gradients cost more than they do."""
DAMPING = 1e-3
"""Of the preconditioner's factors, as a share of their mean diagonal: what is near singular is left to the iterations."""
ROUNDING = 1e-6
"""Eigenvalues below this share of the largest are the rounding of float32 statistics."""


class Subspace:
    """Σ α_t C_t for weights of one shape.

    Args:
        weights: The weights, B of them.
        subspace: One of `KINDS`.
        members: Who takes part.
        factors: α_t.
    """

    def __init__(
        self, weights: Sequence[Weight], subspace: str, members: Sequence[str], factors: Sequence[float]
    ) -> None:
        self.weights = tuple(weights)
        self.factors = tuple(factors)
        self._subspace = subspace
        self._members = tuple(members)
        self._sum: Tensor | None = None
        self._pairs: list[tuple[float, Tensor, Tensor]] = []
        self._ranges: tuple[Tensor | None, ...] = (None, None)
        if subspace == "kfac":
            self._pairs = [
                (factor, self._statistic("output_gram", member), self._statistic("gram", member))
                for member, factor in self._terms()
            ]
            self._ranges = (
                _range([output for _, output, _ in self._pairs]),
                _range([inputs for _, _, inputs in self._pairs]),
            )
        elif subspace != "identity":
            for member, factor in self._terms():
                term = self._statistic(subspace, member).mul_(factor)
                self._sum = term if self._sum is None else self._sum.add_(term)

    def _terms(self) -> Iterable[tuple[str, float]]:
        return zip(self._members, self.factors, strict=True)

    def _statistic(self, kind: str, member: str) -> Tensor:
        """One member's statistic of all weights, float64, a new tensor."""
        values = [weight.statistics[kind][member] for weight in self.weights]
        if kind == "fisher":
            return self.stack([value.double() for value in values])
        return torch.stack([dense(value).double() for value in values])

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        """Tensors in the shape of the weights as [B, out, in], or [B, 1, n] where they are no matrices."""
        turned = [
            matrix(value, weight.transposed) if value.dim() == 2 else value.reshape(1, -1)
            for value, weight in zip(values, self.weights, strict=True)
        ]
        return torch.stack(turned)

    def unstack(self, stacked: Tensor) -> list[Tensor]:
        """What `stack` stacked."""
        return [
            matrix(value, weight.transposed) if weight.base.dim() == 2 else value.reshape(weight.base.shape)
            for value, weight in zip(stacked, self.weights, strict=True)
        ]

    def apply(self, value: Tensor) -> Tensor:
        """(Σ α_t C_t) V for V as `stack` gives it."""
        if self._subspace == "kfac":
            total = torch.zeros_like(value)
            for factor, output, inputs in self._pairs:
                total.add_(output @ value @ inputs, alpha=factor)
            return total
        if self._sum is None:
            return value * sum(self.factors)
        return value @ self._sum if self._subspace == "gram" else value * self._sum

    def project(self, value: Tensor) -> Tensor:
        """V without what no member's K-FAC sees: of a softmax head the mean over classes, of any layer what its inputs lack."""
        outputs, inputs = self._ranges
        value = value if outputs is None else outputs @ value
        return value if inputs is None else value @ inputs

    def right(self) -> Tensor:
        """Σ α_t C_t τ_t."""
        total: Tensor | None = None
        for index, (member, factor) in enumerate(self._terms()):
            delta = self.stack([weight.members[member].double() - weight.base for weight in self.weights])
            if self._subspace == "kfac":
                _, output, inputs = self._pairs[index]
                delta = output @ delta @ inputs
            elif self._subspace == "gram":
                delta = delta @ self._statistic("gram", member)
            elif self._subspace == "fisher":
                delta = delta.mul_(self._statistic("fisher", member))
            total = delta.mul_(factor) if total is None else total.add_(delta, alpha=factor)
        assert total is not None
        return total

    def diagonal(self) -> Tensor:
        """The operator's diagonal, in a shape that broadcasts to [B, out, in]."""
        if self._subspace == "kfac":
            rows = [(f, b.diagonal(dim1=1, dim2=2), a.diagonal(dim1=1, dim2=2)) for f, b, a in self._pairs]
            return torch.stack([factor * b[:, :, None] * a[:, None, :] for factor, b, a in rows]).sum(0)
        if self._sum is None:
            first = self.weights[0].base
            return torch.full((1, 1, 1), sum(self.factors), dtype=torch.float64, device=first.device)
        return self._sum.diagonal(dim1=1, dim2=2)[:, None, :] if self._subspace == "gram" else self._sum

    def preconditioner(self, name: str) -> Callable[[Tensor], Tensor]:
        """M⁻¹ for conjugate gradients.

        Args:
            name: `none`; `jacobi`, the operator's diagonal; `kfac`, V ↦ B̄⁻¹ V Ā⁻¹ with B̄ and Ā the members' weighted sums of
                their two Grams, each with `DAMPING` of its mean diagonal added (Martens & Grosse 2015): of input Grams alone
                that is the solution but for the damping.

        Raises:
            MethodError: `kfac` with a subspace that has no Grams, or factors of both signs.
        """
        if name == "none":
            return lambda value: value
        if name == "jacobi":
            diagonal = self.diagonal()
            scale = torch.where(diagonal > 0, diagonal, 1.0).reciprocal()
            return lambda value: value * scale
        if self._subspace not in ("gram", "kfac"):
            raise MethodError(
                f"preconditioner 'kfac' needs Grams, and subspace '{self._subspace}' has none: use 'jacobi', or 'none'"
            )
        if min(self.factors) < 0:
            raise MethodError("preconditioner 'kfac' needs scaling factors ≥ 0: use 'jacobi', or 'none'")
        if self._subspace == "gram":
            assert self._sum is not None
            inputs = _factored(self._sum)
            return lambda value: torch.cholesky_solve(value.mT, inputs).mT
        output = _factored(_summed([(factor / sum(self.factors), b) for factor, b, _ in self._pairs]))
        inputs = _factored(_summed([(factor, a) for factor, _, a in self._pairs]))
        return lambda value: torch.cholesky_solve(torch.cholesky_solve(value, output).mT, inputs).mT


def _summed(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([factor * value for factor, value in terms]).sum(0)


def _factored(matrices: Tensor) -> Tensor:
    """Cholesky factors of damped positive semi-definite matrices [B, n, n]."""
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1)
    damping = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    factors: Tensor = torch.linalg.cholesky(matrices + damping[:, None, None] * identity)
    return factors


def _range(matrices: Sequence[Tensor]) -> Tensor | None:
    """Projections [B, n, n] on what positive semi-definite matrices see; None where that is everything, or n is large.

    Each counts by its own size, for a certain member's rounding is as small as its Gram.
    """
    if matrices[0].shape[-1] > SMALL:
        return None
    traces = [matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for matrix in matrices]
    sizes = [torch.where(trace > 0, trace, torch.ones_like(trace)) for trace in traces]
    parts = torch.stack([matrix / size for matrix, size in zip(matrices, sizes, strict=True)])
    values, vectors = torch.linalg.eigh(parts.sum(0))
    unseen = vectors * (values <= ROUNDING * values[:, -1:])[:, None, :]
    if not unseen.any():
        return None
    identity = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    seen: Tensor = identity - unseen @ unseen.mT
    return seen
