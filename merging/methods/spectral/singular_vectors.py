"""Merges in the singular vectors of task vectors: matrices of one shape together, whatever is no matrix by its mean.

Experts that are stored as one weight [E, m, n] are E matrices; a convolution's kernel is none.

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
from merging.methods.depth import is_embedding
from merging.methods.latest import Latest
from merging.methods.method import Parameter, Prepared, Weight
from merging.methods.model_types import T5
from merging.recipe import Value

NOISE = 1e-5
"""Singular values below this share of the matrix's largest are rounding noise."""
BATCH_BYTES = 1 << 28
"""Most that the float64 task vectors of one batch take, unless a single one takes more."""

EMBEDDINGS = Parameter(
    "matrix",
    "an embedding is merged as a matrix, or, a table of rows that it is, the mean (T5 and its kin)",
    choices=("matrix", "mean"),
    search=False,
    default_for=dict.fromkeys(T5, "mean"),
)
"""T5 scales nothing that it reads: what its embedding moves by goes through every block at full strength, and where it is tied
into the logits. On a pool of four tasks (the plain average has 15 %) with it as a matrix and as the mean: ACE 0 and 7 %, TSV-M
0 and 11 %, Iso-C 10 and 18 %."""


@dataclass(frozen=True)
class Matrix:
    """A weight that is a matrix, or one expert of a weight that joins several.

    Args:
        weight: The weight.
        expert: Which expert; None where the weight is the matrix.
    """

    weight: Weight
    expert: int | None = None

    def of(self, value: Tensor) -> Tensor:
        """The matrix in a tensor of the weight's shape, as a view."""
        return value if self.expert is None else value[self.expert]


def matrices_of(weight: Weight) -> list[Matrix]:
    """The matrices that a weight consists of; none where it is no matrix."""
    shape = weight.base.shape
    if len(shape) == 2 and shape.numel():
        return [Matrix(weight)]
    if len(shape) == 3 and min(shape) > 1 and "conv" not in weight.name:
        return [Matrix(weight, expert) for expert in range(shape[0])]
    return []


class Matrices:
    """Matrices of one shape, worked on together as [B, m, n].

    Args:
        rows: The matrices, B of them.
        oriented: [m, n] is [out, in], however they are stored; otherwise m ≥ n.
    """

    def __init__(self, rows: Sequence[Matrix], *, oriented: bool) -> None:
        self.rows = tuple(rows)
        self.shape = rows[0].of(rows[0].weight.base).shape
        self._turned = rows[0].weight.transposed if oriented else self.shape[0] < self.shape[1]

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return min(self.shape)

    def turn(self, values: Tensor) -> Tensor:
        """What is stored [B, …] as [B, m, n], and back."""
        return values.mT if self._turned else values

    def moved(self, factors: Mapping[str, float], scratch: Scratch) -> Tensor:
        """Σ α_t τ_t [B, m, n], float64, in a buffer that the next call overwrites."""
        values = [[(row.weight.members[member], factor) for member, factor in factors.items()] for row in self.rows]
        return self._sums("moved", values, scratch)

    def steps_to(self, merged: Mapping[str, Tensor], scratch: Scratch) -> Tensor:
        """θ − θ_0 [B, m, n] of merged weights by name, float64, in a buffer that the next call overwrites."""
        return self._sums("step", [[(merged[row.weight.name], 1.0)] for row in self.rows], scratch)

    def _sums(self, name: str, values: Sequence[Sequence[tuple[Tensor, float]]], scratch: Scratch) -> Tensor:
        """Σ c_i (θ_i − θ_0) of every matrix."""
        device = self.rows[0].weight.base.device
        total = scratch.take(name, len(self.rows), *self.shape, device=device, dtype=torch.float64)
        for matrix, row, terms in zip(self.rows, total, values, strict=True):
            rest = -sum(factor for _, factor in terms)
            accumulate(row, [*((matrix.of(v), f) for v, f in terms), (matrix.of(matrix.weight.base), rest)], scratch)
        return self.turn(total)


def batches_of(matrices: Iterable[Matrix], *, oriented: bool) -> list[Matrices]:
    """Matrices by shape, as many together as `BATCH_BYTES` allows."""
    shaped: dict[tuple[torch.Size, bool], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        shaped[matrix.of(matrix.weight.base).shape, oriented and matrix.weight.transposed].append(matrix)
    batches = []
    for (shape, _), group in shaped.items():
        size = max(1, BATCH_BYTES // (8 * shape.numel()))
        batches += [Matrices(group[i : i + size], oriented=oriented) for i in range(0, len(group), size)]
    return batches


def directions(matrices: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors.

    Args:
        matrices: [B, m, n], m ≥ n, float64.
        size: What a value must not be noise of [B]; by default the matrix's largest.

    Returns:
        Values [B, n], 0 where they are noise, and vectors [B, n, n], one a column.
    """
    squares, vectors = torch.linalg.eigh(matrices.mT @ matrices)
    values = squares.flip(1).clamp(min=0).sqrt()
    least = NOISE * (values[:, :1] if size is None else size[:, None])
    return values.masked_fill(values <= least, 0.0), vectors.flip(2)


def triples(matrices: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values, descending, with left and right singular vectors; both are 0 where the value is noise.

    Args:
        matrices: [B, m, n], float64.
        size: As for `directions`.

    Returns:
        U [B, m, r], values [B, r] and V [B, n, r], r = min(m, n).
    """
    wide = matrices.shape[1] < matrices.shape[2]
    tall = matrices.mT if wide else matrices
    values, vectors = directions(tall, size)
    others = tall @ (vectors * inverse(values)[:, None, :])
    vectors = vectors * (values > 0)[:, None, :]
    return (vectors, values, others) if wide else (others, values, vectors)


def norms(matrices: Tensor) -> Tensor:
    """Frobenius norms [B] of [B, m, n]."""
    return matrices.square().sum((1, 2)).sqrt()


def polar(matrices: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The polar factor U Vᵀ of A = U Σ Vᵀ, the nearest matrix with orthogonal columns (or rows), and the mean of Σ.

    Without directions that are rounding: what columns have in common they share, and columns of 0 stay 0.

    Args:
        matrices: A [B, m, n], float64.
        rank: How many directions, the strongest, both are taken over; by default all.

    Returns:
        U Vᵀ [B, m, n] and the mean [B], 0 where A is.
    """
    wide = matrices.shape[1] < matrices.shape[2]
    tall = matrices.mT if wide else matrices
    values, vectors = directions(tall)
    if rank is not None:
        values[:, rank:] = 0.0
    factor = tall @ ((vectors * inverse(values)[:, None, :]) @ vectors.mT)
    return factor.mT if wide else factor, mean_size(values)


def mean_size(values: Tensor) -> Tensor:
    """The mean [B] of those of B matrices' singular values [B, r] that are no noise; 0 where all are."""
    return values.sum(1) / (values > 0).sum(1).clamp(min=1)


def inverse(values: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(values > 0, 1 / values, 0.0)


class PreparedSpectral(Prepared):
    """Base and members as they are stored; subclasses say what a batch of matrices moves by.

    A factor that all members share scales what they move by; that is computed for 1 and kept.

    Args:
        weights: The weights to merge.
    """

    oriented: ClassVar[bool] = False
    """Whether outputs and inputs are not alike to the method, so that matrices are worked on as [out, in]."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.members = check_weights(weights)
        self.scratch = Scratch()
        matrices = {weight.name: self.matrices(weight) for weight in weights}
        self.batches = batches_of([matrix for each in matrices.values() for matrix in each], oriented=self.oriented)
        self.rest = [weight for weight in weights if not matrices[weight.name]]
        self._tables = [weight for weight in weights if matrices[weight.name] and is_embedding(weight.name)]
        # whether each member's part is kept apart → of every batch, what members move it by; [B, out, in] float32
        self._kept: dict[bool, Latest[list[list[Tensor]]]] = {False: Latest(), True: Latest()}

    def matrices(self, weight: Weight) -> list[Matrix]:
        """The matrices of a weight that are merged by their singular vectors; none where it is the mean."""
        return matrices_of(weight)

    def is_sum(self, parameters: Mapping[str, Value]) -> bool:
        """Whether what members move by is a sum of what each does, so that this is kept as well."""
        return False

    @abstractmethod
    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """What the matrices of one of `batches` move by, for one scaling of the same members after the other.

        Each [B, m, n], float64; may be overwritten by the next.
        """

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Matrices batch by batch; the rest is θ_0 + Σ α_t τ_t / T, with `embeddings` = `mean` embeddings, too."""
        factors = {member: scaling[member] for member in chosen(scaling, self.members)}
        means = self._means(parameters)
        destinations = [[row.of(target(out, row.weight)) for row in batch.rows] for batch in self.batches]
        shared = len(set(factors.values())) == 1
        moved: Iterable[list[Tensor]]
        if shared or self.is_sum(parameters):
            moved = self._solution(tuple(factors), parameters, apart=not shared)
            scales = list(factors.values())[: 1 if shared else None]
        else:
            moved, scales = self._moved([factors], parameters), [1.0]
        for batch, parts, written in zip(self.batches, moved, destinations, strict=True):
            for row, (matrix, destination) in enumerate(zip(batch.rows, written, strict=True)):
                if matrix.weight.name in means:
                    continue
                terms = [(part[row], scale) for part, scale in zip(parts, scales, strict=True)]
                weighted_sum([(matrix.of(matrix.weight.base), 1.0), *terms], destination, self.scratch)
        mean_step(list(means.values()), factors, out, self.scratch)

    def _means(self, parameters: Mapping[str, Value]) -> dict[str, Weight]:
        """By name, the weights that are the mean: what has no matrices, and embeddings where the parameters say so."""
        tables = self._tables if parameters.get("embeddings") == "mean" else []
        return {weight.name: weight for weight in [*self.rest, *tables]}

    def _solution(
        self, members: tuple[str, ...], parameters: Mapping[str, Value], *, apart: bool
    ) -> list[list[Tensor]]:
        """What factors of 1 move by, of every batch; kept until other members or parameters are asked for."""
        alone = [{member: float(member == one) for member in members} for one in members]
        scalings = alone if apart else [dict.fromkeys(members, 1.0)]
        key = members, dict(parameters)
        return self._kept[apart].get(key, lambda: list(self._moved(scalings, parameters)))

    def _moved(
        self, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[list[Tensor]]:
        """Batch by batch, what matrices move by for each scaling [B, out, in], float32; nothing where all are the mean."""
        means = self._means(parameters)
        for index, batch in enumerate(self.batches):
            if all(row.weight.name in means for row in batch.rows):
                yield []
            else:
                yield [batch.turn(step).float().contiguous() for step in self.steps(index, scalings, parameters)]
