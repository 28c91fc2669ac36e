"""Linear layers with the Grams of their inputs: shared Grams are factored once, equal shapes together."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate as accumulated

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch, accumulate, difference, weighted_sum
from merging.kernels.gram_sketch import dense, diagonal, is_sketch
from merging.methods.checks import statistic, target
from merging.methods.depth import is_embedding
from merging.methods.method import Weight

CPU_BYTES = 1 << 24
"""Most that the float64 Grams of one batch take on a CPU, which is no faster with many and slower once they leave its cache."""
DEVICE_BYTES = 1 << 28
"""The same on an accelerator; a single Gram may take more."""


def matrix(value: Tensor, transposed: bool) -> Tensor:
    """A weight as [out, in]."""
    return value.mT if transposed else value


class System:
    """Weights that read one input, and so share one Gram (query, key, value).

    Args:
        weights: The weights, each [out_i, in] or transposed.
        grams: Member → G_t [in, in], or its sketch.
    """

    def __init__(self, weights: Sequence[Weight], grams: Mapping[str, Tensor]) -> None:
        self.weights = tuple(weights)
        self.grams = grams
        stops = list(accumulated(matrix(weight.base, weight.transposed).shape[0] for weight in weights))
        self.rows = [(w, slice(start, stop)) for w, start, stop in zip(weights, [0, *stops], stops, strict=False)]
        """The weights with their rows among the outputs of all."""
        self.shape = (stops[-1], matrix(weights[0].base, weights[0].transposed).shape[1])
        """[Σ out_i, in]."""
        self._products: dict[str, Tensor | None] = {}

    def product(self, member: str, scratch: Scratch) -> Tensor:
        """τ_t @ G_t of all weights, one below the other [Σ out_i, in].

        In float64, since solving magnifies whatever is rounded here. Kept from the second time on that a member is asked for:
        who merges the same members again and again needs it once, and who chooses among them will come back. The first time
        it lies in a buffer that the next call overwrites.
        """
        product = self._products.get(member)
        if product is None:
            own = self.grams[member]
            gram = dense(own) if is_sketch(own) else _wide("gram", own, scratch)
            if member in self._products:
                product = self._products[member] = torch.empty(self.shape, dtype=gram.dtype, device=gram.device)
            else:
                product = scratch.take("product", *self.shape, device=gram.device, dtype=gram.dtype)
                self._products[member] = None
            for weight, rows in self.rows:
                delta = _wide("delta", weight.members[member], scratch).sub_(weight.base)
                torch.mm(matrix(delta, weight.transposed), gram, out=product[rows])
        return product

    def write(self, terms: Sequence[tuple[Tensor, float]], out: Mapping[str, Tensor], scratch: Scratch) -> None:
        """Writes W_0 + Σ c_i X_i, with every X_i [Σ out_i, in]."""
        for weight, rows in self.rows:
            moved = [(matrix(value[rows], weight.transposed), factor) for value, factor in terms]
            weighted_sum([(weight.base, 1.0), *moved], target(out, weight), scratch)


class SystemBatch:
    """Systems of one shape, solved together.

    Args:
        systems: The systems, all [out, in].
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

    def rounding(self, members: Sequence[str]) -> float:
        """Relative error of the Grams' entries: the machine epsilon of the coarsest dtype that one is stored in."""
        return max(torch.finfo(system.grams[m].dtype).eps for system in self.systems for m in members)

    def gram_sum(self, members: Sequence[str], factors: Sequence[float], rho: float, beta: float = 0.0) -> Tensor:
        """Σ α_t (ρ G_t + (1 − ρ) diag(G_t) + β mean(diag(G_t)) I) [B, in, in], float64; the next call overwrites it."""
        sums = self._take("grams", self._inputs)
        for total, system in zip(sums, self.systems, strict=True):
            terms = [(system.grams[member], factor) for member, factor in zip(members, factors, strict=True)]
            accumulate(total, [term for term in terms if not is_sketch(term[0])], self._scratch)
            for gram, weight in terms:
                if is_sketch(gram):
                    total.add_(dense(gram), alpha=weight)
            own = total.diagonal().clone()
            own += beta * own.mean()  # that of the sum is the sum of the members'
            total.mul_(rho).diagonal().copy_(own)
        return sums

    def right(
        self,
        members: Sequence[str],
        factors: Sequence[float],
        part: Sequence[int],
        rho: float,
        pull: Tensor,
        beta: float = 0.0,
    ) -> Tensor:
        """Σ α_t G̃_t τ_tᵀ, transposed [B, out, in], float64, in a buffer that the next call overwrites.

        Args:
            members: All who take part.
            factors: α_t.
            part: Whose terms to sum.
            rho: ρ.
            pull: What a ridge put on the diagonal [B, in]; the members' mean task vector is weighted by it.
            beta: β.
        """
        pulled = bool((pull > 0).any())
        right = self._take("right", self._outputs)
        for index, (total, system) in enumerate(zip(right, self.systems, strict=True)):
            total.zero_()
            for i in part:
                total.add_(system.product(members[i], self._scratch), alpha=factors[i] * rho)
            if rho < 1 or beta or pulled:
                columns = {}
                for i in part:
                    own = diagonal(system.grams[members[i]])
                    columns[members[i]] = own * (factors[i] * (1 - rho)) + pull[index] / len(members)
                    if beta:
                        columns[members[i]] += factors[i] * beta * own.double().mean()
                for weight, rows in system.rows:
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


def _wide(name: str, value: Tensor, scratch: Scratch) -> Tensor:
    """The same numbers in float64, in the buffer of this name."""
    return scratch.take(name, *value.shape, device=value.device, dtype=torch.float64).copy_(value)


def batches(weights: Sequence[Weight], scratch: Scratch) -> list[SystemBatch]:
    """The weights that have Grams, by shape.

    Raises:
        MethodError: A Gram is missing, not finite, of another shape, or has a negative diagonal.
    """
    shared: dict[tuple[int, ...], list[Weight]] = defaultdict(list)
    grams: dict[tuple[int, ...], Mapping[str, Tensor]] = {}
    for weight in weights:
        if own_grams := grams_of(weight):
            key = tuple(own_grams[member].data_ptr() for member in sorted(own_grams))
            shared[key].append(weight)
            grams[key] = own_grams
    shaped: dict[tuple[int, int], list[System]] = defaultdict(list)
    for key, group in shared.items():
        system = System(group, grams[key])
        shaped[system.shape].append(system)
    made = []
    for (_, inputs), systems in shaped.items():
        most = CPU_BYTES if weights[0].base.device.type == "cpu" else DEVICE_BYTES
        size = max(1, most // (8 * inputs * inputs))
        made += [SystemBatch(systems[start : start + size], scratch) for start in range(0, len(systems), size)]
    return made


def averaged_layers(rest: Sequence[Weight]) -> dict[str, float]:
    """`averaged_layers`, for a report: how many matrices besides embeddings have no Gram (a mixture's experts).

    Args:
        rest: The weights that have none and are the members' mean.
    """
    matrices = sum(weight.base.dim() > 1 and not is_embedding(weight.name) for weight in rest)
    return {"averaged_layers": float(matrices)} if matrices else {}


def unreached(batches: Iterable[SystemBatch]) -> dict[str, float]:
    """`unreached_experts`, for a report: how many matrices no member's rows reached, so that they are the mean."""
    count = sum(
        len(system.weights)
        for batch in batches
        for system in batch.systems
        if not any(bool(diagonal(gram).any()) for gram in system.grams.values())
    )
    return {"unreached_experts": float(count)} if count else {}


def grams_of(weight: Weight) -> dict[str, Tensor]:
    """A weight's Grams, checked; none where it has none."""
    if not weight.statistics.get("gram"):
        return {}
    if weight.base.dim() != 2:
        raise MethodError(f"'{weight.name}' has shape {list(weight.base.shape)} and a gram: only matrices can have one")
    inputs = matrix(weight.base, weight.transposed).shape[1]
    grams = statistic(weight, "gram", (inputs, inputs), nonnegative=False)
    for member, gram in grams.items():
        if (low := diagonal(gram).min().item()) < 0:
            raise MethodError(
                f"{member}: gram of '{weight.name}' has a negative diagonal ({low:g}): a sum of squares "
                "never has. Compute the gram statistic of this member again"
            )
    return grams
