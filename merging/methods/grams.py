"""Linear layers with the Grams of their inputs: shared Grams are factored once, equal shapes together."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.base import Weight
from merging.methods.blocks import Scratch, accumulate, difference, target, weighted_sum
from merging.methods.checks import statistic

BATCH_BYTES = 1 << 28
"""Most that the float64 matrices of one batch take, unless a single one takes more."""


def matrix(value: Tensor, transposed: bool) -> Tensor:
    """A weight as [out, in]."""
    return value.mT if transposed else value


@dataclass(frozen=True)
class System:
    """Weights that read one input, and so share one Gram (query, key, value).

    Args:
        weights: The weights, each [out_i, in] or transposed.
        grams: Member → G_t [in, in].
        products: Member → τ_t @ G_t of all weights, one below the other [Σ out_i, in]; float64, since solving
            magnifies whatever is rounded here.
    """

    weights: tuple[Weight, ...]
    grams: Mapping[str, Tensor]
    products: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """[Σ out_i, in]."""
        rows, columns = next(iter(self.products.values())).shape
        return rows, columns

    def rows(self) -> Iterable[tuple[Weight, slice]]:
        """The weights with their rows in `products`."""
        start = 0
        for weight in self.weights:
            stop = start + matrix(weight.base, weight.transposed).shape[0]
            yield weight, slice(start, stop)
            start = stop

    def write(self, terms: Sequence[tuple[Tensor, float]], out: Mapping[str, Tensor], scratch: Scratch) -> None:
        """Writes W_0 + Σ c_i X_i, with every X_i [Σ out_i, in]."""
        for weight, rows in self.rows():
            moved = [(matrix(value[rows], weight.transposed), factor) for value, factor in terms]
            weighted_sum([(weight.base, 1.0), *moved], target(out, weight), scratch)


class Batch:
    """Systems of one shape, solved together.

    Args:
        systems: The systems; all products [out, in].
        scratch: Where sums are taken.
    """

    def __init__(self, systems: Sequence[System], scratch: Scratch) -> None:
        self.systems = tuple(systems)
        self._outputs, self._inputs = self.systems[0].shape
        self._device = self.systems[0].weights[0].base.device
        self._scratch = scratch

    def _take(self, name: str, rows: int) -> Tensor:
        shape = (len(self.systems), rows, self._inputs)
        return self._scratch.take(name, *shape, device=self._device, dtype=torch.float64)

    def gram_sum(self, members: Sequence[str], factors: Sequence[float], rho: float) -> Tensor:
        """Σ α_t (ρ G_t + (1 − ρ) diag(G_t)) [B, in, in], float64; the next call overwrites it."""
        sums = self._take("grams", self._inputs)
        for total, system in zip(sums, self.systems, strict=True):
            terms = [(system.grams[member], factor) for member, factor in zip(members, factors, strict=True)]
            accumulate(total, terms, self._scratch)
            diagonal = total.diagonal().clone()
            total.mul_(rho).diagonal().copy_(diagonal)
        return sums

    def right(
        self, members: Sequence[str], factors: Sequence[float], part: Sequence[int], rho: float, pull: Tensor
    ) -> Tensor:
        """Σ α_t G̃_t τ_tᵀ, transposed [B, out, in], float64, in a buffer that the next call overwrites.

        Args:
            members: All who take part.
            factors: α_t.
            part: Whose terms to sum.
            rho: ρ.
            pull: What a ridge put on the diagonal [B, in]; the members' mean task vector is weighted by it.
        """
        pulled = bool((pull > 0).any())
        right = self._take("right", self._outputs)
        for index, (total, system) in enumerate(zip(right, self.systems, strict=True)):
            accumulate(total, [(system.products[members[i]], factors[i] * rho) for i in part], self._scratch)
            if rho < 1 or pulled:
                columns = {
                    members[i]: system.grams[members[i]].diagonal() * (factors[i] * (1 - rho))
                    + pull[index] / len(members)
                    for i in part
                }
                for weight, rows in system.rows():
                    total[rows].add_(self._scaled(weight, columns))
        return right

    def _scaled(self, weight: Weight, columns: Mapping[str, Tensor]) -> Tensor:
        """Σ_t τ_t ∘ c_t [out, in], with a number c_t [in] for every input."""
        size = weight.base.shape
        total = self._scratch.take("scaled", *size, device=self._device).zero_()
        delta = self._scratch.take("delta", *size, device=self._device)
        for member, column in columns.items():
            scale = column.to(torch.float32)
            difference(weight.members[member], weight.base, delta)
            total.addcmul_(delta, scale[:, None] if weight.transposed else scale)
        return matrix(total, weight.transposed)


def _delta(weight: Weight, member: str) -> Tensor:
    """τ_t [out, in]; float64, a new tensor."""
    value = weight.members[member].to(torch.float64, copy=True).sub_(weight.base)
    return matrix(value, weight.transposed)


def batches(weights: Sequence[Weight], scratch: Scratch) -> list[Batch]:
    """The weights that have Grams, by shape.

    Raises:
        MethodError: A Gram is missing, not finite, of another shape, or has a negative diagonal.
    """
    shared: dict[tuple[int, ...], list[Weight]] = defaultdict(list)
    grams: dict[tuple[int, ...], Mapping[str, Tensor]] = {}
    for weight in weights:
        if found := _grams(weight):
            key = tuple(found[member].data_ptr() for member in sorted(found))
            shared[key].append(weight)
            grams[key] = found
    shaped: dict[tuple[int, int], list[System]] = defaultdict(list)
    for key, group in shared.items():
        products = {
            member: torch.cat([_delta(weight, member) for weight in group]) @ gram.to(torch.float64)
            for member, gram in grams[key].items()
        }
        system = System(tuple(group), grams[key], products)
        shaped[system.shape].append(system)
    made = []
    for (_, inputs), systems in shaped.items():
        size = max(1, BATCH_BYTES // (8 * inputs * inputs))
        made += [Batch(systems[start : start + size], scratch) for start in range(0, len(systems), size)]
    return made


def _grams(weight: Weight) -> dict[str, Tensor]:
    """A weight's Grams, checked; none where it has none."""
    if not weight.statistics.get("gram"):
        return {}
    if weight.base.dim() != 2:
        raise MethodError(f"'{weight.name}' has shape {list(weight.base.shape)} and a gram: only matrices can have one")
    inputs = matrix(weight.base, weight.transposed).shape[1]
    found = statistic(weight, "gram", (inputs, inputs), nonnegative=False)
    for member, gram in found.items():
        if (low := gram.diagonal().min().item()) < 0:
            raise MethodError(
                f"{member}: gram of '{weight.name}' has a negative diagonal ({low:g}): a sum of squares "
                "never has. Compute the gram statistic of this member again"
            )
    return found
