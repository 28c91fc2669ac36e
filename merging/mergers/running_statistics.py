"""What BatchNorm layers have seen: no method's arithmetic holds for a variance, so all methods average it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from merging.checkpoints.formats.buffers import is_running_statistic
from merging.methods import Context, Method, Prepared, Weight
from merging.recipe import Value


def parameters_of(weights: Iterable[Weight]) -> Iterator[Weight]:
    """The weights that a method merges."""
    return (weight for weight in weights if not is_running_statistic(weight.name))


def prepare(method: Method, weights: Sequence[Weight], context: Context) -> Prepared:
    """A method's state for some weights; running statistics among them are averaged, weighted by the scaling factors.

    Raises:
        MethodError: As `Method.prepare`.
    """
    averaged = [weight for weight in weights if is_running_statistic(weight.name)]
    if not averaged:
        return method.prepare(weights, context)
    own = list(parameters_of(weights))
    return _WithStatistics(method.prepare(own, context) if own else None, averaged)


class _WithStatistics(Prepared):
    """A method's state, and running statistics.

    Args:
        inner: The method's; None where there are running statistics alone.
        averaged: The running statistics.
    """

    def __init__(self, inner: Prepared | None, averaged: Sequence[Weight]) -> None:
        self._inner = inner
        self._averaged = averaged

    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Σ w_t s_t / Σ w_t with w_t = max(α_t, 0), which no factor makes negative; the base's where no factor is positive."""
        if self._inner is not None:
            self._inner.merge(scaling, parameters, out)
        shares = {member: factor for member, factor in scaling.items() if factor > 0}
        total = sum(shares.values())
        for weight in self._averaged:
            if not shares:
                out[weight.name].copy_(weight.base)
                continue
            mean = torch.zeros(weight.base.shape, dtype=torch.float64, device=weight.base.device)
            for member, share in shares.items():
                mean.add_(weight.members[member].double(), alpha=share / total)
            out[weight.name].copy_(mean)

    def report(self) -> dict[str, float]:
        """The method's."""
        return {} if self._inner is None else self._inner.report()
