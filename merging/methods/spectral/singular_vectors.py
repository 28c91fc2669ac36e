"""Merges in the singular vectors of task vectors: matrices of one shape together, whatever is no matrix by its mean.

A matrix A [m, n] is taken apart by the eigenvectors of its smaller Gram matrix in float64. Directions whose singular
value is below `NOISE` of the largest are none: rounding put them there (a LoRA member has rank 8), and what makes all
directions equally strong must not find them.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch, accumulate, weighted_sum
from merging.methods.averaging.weighted_sum import mean_step
from merging.methods.checks import check_weights, chosen, target
from merging.methods.method import Prepared, Weight
from merging.recipe import Value

NOISE = 1e-5
"""Singular values below this share of the matrix's largest are rounding noise."""
BATCH_BYTES = 1 << 28
"""Most that the float64 task vectors of one batch take, unless a single one takes more."""


class Matrices:
    """Weights of one shape [out, in], worked on together as [B, m, n] with m ≥ n.

    Args:
        weights: The weights, B of them.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self._shape = weights[0].base.shape
        self._wide = self._shape[0] < self._shape[1]

    @property
    def rank(self) -> int:
        """Number of singular values, n."""
        return min(self._shape)

    def tall(self, values: Tensor) -> Tensor:
        """[B, out, in] as [B, m, n], and back."""
        return values.mT if self._wide else values

    def moved(self, factors: Mapping[str, float], scratch: Scratch) -> Tensor:
        """Σ α_t τ_t [B, m, n], float64, in a buffer that the next call overwrites."""
        device = self.weights[0].base.device
        total = scratch.take("moved", len(self.weights), *self._shape, device=device, dtype=torch.float64)
        for row, weight in zip(total, self.weights, strict=True):
            terms = [(weight.members[member], factor) for member, factor in factors.items()]
            accumulate(row, [*terms, (weight.base, -sum(factors.values()))], scratch)
        return self.tall(total)


def directions(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors.

    Args:
        matrices: [B, m, n], m ≥ n, float64.

    Returns:
        Values [B, n], 0 where they are noise, and vectors [B, n, n], one a column.
    """
    squares, vectors = torch.linalg.eigh(matrices.mT @ matrices)
    values = squares.flip(1).clamp(min=0).sqrt()
    return values.masked_fill(values <= NOISE * values[:, :1], 0.0), vectors.flip(2)


def inverse(values: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(values > 0, 1 / values, 0.0)


@dataclass(frozen=True)
class Kept:
    """What matrices move by at factors of 1, which any candidate of these members and parameters only scales.

    Args:
        members: The members.
        parameters: The candidate's parameters.
        moved: Of every batch: what all members move it by, or each alone; [B, out, in] float32.
    """

    members: tuple[str, ...]
    parameters: Mapping[str, Value]
    moved: list[list[Tensor]]


class PreparedSpectral(Prepared):
    """Base and members as they are stored; subclasses say what a batch of matrices moves by.

    A factor that all members share scales what they move by; that is computed for 1 and kept.

    Args:
        weights: The weights to merge.
    """

    linear: ClassVar[bool] = False
    """Whether what members move by is a sum of what each does, so that this is kept as well."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.members = check_weights(weights)
        self.scratch = Scratch()
        self._rest = [weight for weight in weights if weight.base.dim() != 2 or not weight.base.numel()]
        shaped: dict[torch.Size, list[Weight]] = defaultdict(list)
        for weight in weights:
            if weight.base.dim() == 2 and weight.base.numel():
                shaped[weight.base.shape].append(weight)
        self.batches = []
        for shape, group in shaped.items():
            size = max(1, BATCH_BYTES // (8 * shape.numel()))
            self.batches += [Matrices(group[start : start + size]) for start in range(0, len(group), size)]
        self._kept: dict[bool, Kept] = {}

    @abstractmethod
    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """What the matrices of one of `batches` move by, for one scaling of the same members after the other.

        Each [B, m, n], float64; may be overwritten by the next.
        """

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Matrices batch by batch; the rest is θ_0 + Σ α_t τ_t / T."""
        factors = {member: scaling[member] for member in chosen(scaling, self.members)}
        destinations = [[target(out, weight) for weight in batch.weights] for batch in self.batches]
        shared = len(set(factors.values())) == 1
        moved: Iterable[list[Tensor]]
        if shared or self.linear:
            moved = self._solution(tuple(factors), parameters, apart=not shared).moved
            scales = list(factors.values())[: 1 if shared else None]
        else:
            moved, scales = self._moved([factors], parameters), [1.0]
        for batch, parts, written in zip(self.batches, moved, destinations, strict=True):
            for row, (weight, destination) in enumerate(zip(batch.weights, written, strict=True)):
                terms = [(part[row], scale) for part, scale in zip(parts, scales, strict=True)]
                weighted_sum([(weight.base, 1.0), *terms], destination, self.scratch)
        mean_step(self._rest, factors, out, self.scratch)

    def _solution(self, members: tuple[str, ...], parameters: Mapping[str, Value], *, apart: bool) -> Kept:
        """What factors of 1 move by; kept until other members or parameters are asked for."""
        kept = self._kept.get(apart)
        if kept is None or (kept.members, kept.parameters) != (members, dict(parameters)):
            self._kept.pop(apart, None)  # before the new one takes memory
            ones = dict.fromkeys(members, 1.0)
            alone = [{member: float(member == one) for member in members} for one in members]
            moved = list(self._moved(alone if apart else [ones], parameters))
            self._kept[apart] = Kept(members, dict(parameters), moved)
        return self._kept[apart]

    def _moved(
        self, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[list[Tensor]]:
        """Batch by batch, what matrices move by for each scaling [B, out, in], float32."""
        for index, batch in enumerate(self.batches):
            yield [batch.tall(step).float().contiguous() for step in self.steps(index, scalings, parameters)]
