"""Merges under diagonal curvatures: θ = θ_0 + Σ α_t (P + H_t) τ_t / (P + Σ α_t H_t), elementwise.

Fisher averaging is the case P = 0; gradient matching has the base's curvature as P.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch, difference, flat, spans, weighted_sum
from merging.methods.averaging.average import shares
from merging.methods.checks import check_weights, statistic, target
from merging.methods.method import Weight
from merging.recipe import BASE

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Curvature:
    """A candidate's curvatures: H_t = max(scale_t F_t, floor) and P = base_scale F_0 + delta.

    Args:
        members: Who takes part, in the order of all sums.
        factors: α_t.
        scales: scale_t.
        floor: Least entry of every H_t.
        base_scale: Weight of the base's Fisher; 0 where it has no part.
        delta: Constant part of P.
        clamp: Raise denominators to `delta` instead of refusing those that are not positive.
    """

    members: Sequence[str]
    factors: Sequence[float]
    scales: Sequence[float]
    floor: float = 0.0
    base_scale: float = 0.0
    delta: float = 0.0
    clamp: bool = False

    @property
    def safe(self) -> bool:
        """Whether no denominator can be negative, or 0 where a curvature is not."""
        return self.clamp or min(self.factors) >= 0

    @property
    def has_gaps(self) -> bool:
        """Whether some entries may have no curvature at all: 0/0."""
        return self.delta + self.floor == 0


class Diagonal:
    """Base, members and Fisher information of some weights, as they are stored.

    Args:
        weights: The weights to merge.

    Raises:
        MethodError: Weights or Fisher information of wrong shape, negative, not finite, or missing for a
            member.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.members = check_weights(weights)
        self.weights = tuple(weights)
        self.fishers = [
            statistic(weight, "fisher", weight.base.shape, nonnegative=True, base=True) for weight in weights
        ]
        self._scratch = Scratch()
        self.gaps = 0
        """Entries of the last merge that no curvature says anything of: they are the mean, weighted by the factors."""

    def merge(self, curvature: Curvature, out: Mapping[str, Tensor]) -> None:
        """One pass over base, members and Fisher information.

        Where denominators may cancel there is one pass more, before anything is written.

        Raises:
            MethodError: Denominators that are not positive, unless they are to be clamped.
        """
        self.gaps = 0
        if not curvature.safe:
            self._refuse_cancelling(curvature)
        for weight, fishers in zip(self.weights, self.fishers, strict=True):
            destination = target(out, weight)
            if fishers:
                self._merge_weight(weight, fishers, curvature, destination)
            else:
                self._merge_flat(weight, curvature, destination)

    def _merge_flat(self, weight: Weight, curvature: Curvature, out: Tensor) -> None:
        """A weight without Fisher information has the same curvature, the floor, everywhere."""
        factors = curvature.factors
        if curvature.has_gaps:
            factors = _shares(curvature)
            self.gaps += weight.base.numel()
        elif curvature.floor > 0:
            over = (curvature.delta + curvature.floor) / (curvature.delta + curvature.floor * sum(factors))
            factors = [factor * over for factor in factors]
        members = [weight.members[member] for member in curvature.members]
        weighted_sum([(weight.base, 1.0 - sum(factors)), *zip(members, factors, strict=True)], out, self._scratch)

    def _merge_weight(self, weight: Weight, fishers: Mapping[str, Tensor], curvature: Curvature, out: Tensor) -> None:
        base = weight.base.reshape(-1)
        values = [weight.members[member].reshape(-1) for member in curvature.members]
        with flat(out) as destination:
            for start, stop in spans(base.numel(), base.device, rows=4):
                upper = self._scratch.take("upper", stop - start, device=base.device).zero_()
                delta = self._scratch.take("delta", stop - start, device=base.device)
                lower, prior = self._prior(fishers, curvature, start, stop)
                curved = self._curvatures(fishers, curvature, start, stop)
                for row, factor, value in zip(curved, curvature.factors, values, strict=True):
                    lower.add_(row, alpha=factor)
                    if prior is not None:
                        row.add_(prior)
                    elif curvature.delta:
                        row.add_(curvature.delta)
                    upper.addcmul_(row, difference(value[start:stop], base[start:stop], delta), value=factor)
                if curvature.has_gaps:
                    gaps = self._gaps(fishers, curvature, start, stop)
                    if len(gaps):
                        self.gaps += len(gaps)
                        before = base[start:stop][gaps].float()
                        moved = [value[start:stop][gaps].float().sub_(before) for value in values]
                        upper[gaps] = sum(s * m for s, m in zip(_shares(curvature), moved, strict=True))
                        lower[gaps] = 1.0
                if curvature.clamp:
                    lower.clamp_(min=max(curvature.delta, TINY))
                destination[start:stop].copy_(upper.div_(lower).add_(base[start:stop]))

    def _prior(
        self, fishers: Mapping[str, Tensor], curvature: Curvature, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None]:
        """P of a block, to sum denominators onto, and once more where it differs from entry to entry."""
        device = fishers[curvature.members[0]].device
        lower = self._scratch.take("lower", stop - start, device=device)
        if not curvature.base_scale:
            return lower.fill_(curvature.delta), None
        prior = self._scratch.take("prior", stop - start, device=device)
        prior.copy_(fishers[BASE].reshape(-1)[start:stop]).mul_(curvature.base_scale).add_(curvature.delta)
        return lower.copy_(prior), prior

    def _curvatures(
        self, fishers: Mapping[str, Tensor], curvature: Curvature, start: int, stop: int
    ) -> Iterator[Tensor]:
        """H_t of a block, member by member, each in the same buffer."""
        for member, scale in zip(curvature.members, curvature.scales, strict=True):
            fisher = fishers[member].reshape(-1)[start:stop]
            row = self._scratch.take("curvature", stop - start, device=fisher.device)
            if fisher.dtype == torch.float32:
                torch.mul(fisher, scale, out=row)
            else:
                row.copy_(fisher).mul_(scale)
            yield row.clamp_(min=curvature.floor) if curvature.floor else row

    def _gaps(self, fishers: Mapping[str, Tensor], curvature: Curvature, start: int, stop: int) -> Tensor:
        """The entries of a block where P and every α_t H_t are 0."""
        whole = self._scratch.take("whole", stop - start, device=fishers[curvature.members[0]].device).zero_()
        if curvature.base_scale:
            whole.add_(fishers[BASE].reshape(-1)[start:stop], alpha=curvature.base_scale)
        curved = self._curvatures(fishers, curvature, start, stop)
        for row, factor in zip(curved, curvature.factors, strict=True):
            whole.add_(row, alpha=abs(factor))
        return (whole == 0).nonzero()[:, 0]

    def _refuse_cancelling(self, curvature: Curvature) -> None:
        """Looks at all denominators before anything is written."""
        bad = entries = 0
        for weight, fishers in zip(self.weights, self.fishers, strict=True):
            for start, stop in spans(weight.base.numel() if fishers else 0, weight.base.device, rows=3):
                lower, _ = self._prior(fishers, curvature, start, stop)
                curved = self._curvatures(fishers, curvature, start, stop)
                for row, factor in zip(curved, curvature.factors, strict=True):
                    lower.add_(row, alpha=factor)
                bad += int((lower <= 0).sum())
                bad -= len(self._gaps(fishers, curvature, start, stop)) if curvature.has_gaps else 0
                entries += stop - start
        if bad:
            raise MethodError(
                f"the scaling factors cancel the curvature of {bad / entries:.2%} of the entries "
                f"({bad:,} of {entries:,}): the denominator there is 0 or negative. Use less negative "
                "scaling factors, or, in gradient matching, a larger delta or clamp"
            )


def _shares(curvature: Curvature) -> list[float]:
    """α_t as weights of a mean."""
    scaling = dict(zip(curvature.members, curvature.factors, strict=True))
    return list(shares(scaling, curvature.members).values())
