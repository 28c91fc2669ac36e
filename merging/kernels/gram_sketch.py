"""A large Gram matrix as a sketch: a Nyström approximation of low rank, and its diagonal exactly.

G [n, n] is kept by what it makes of r random vectors Ω [n, r]: Y = G Ω and C = Ωᵀ G Ω, of which Ĝ = Y C⁻¹ Yᵀ is as near to G as
about r of its eigenvectors are, and 0 ≼ Ĝ ≼ G (Halko, Martinsson & Tropp 2011, section 5.4). What Ĝ lacks of G's diagonal d is
added to it. Y, C and d are sums over rows, so that sketches of parts add up as Grams do, and G itself is never there. A row
of Ω has `SIGNS` random signs and is 0 elsewhere: an input a thousand times as large as the others is in few columns, and
float32 has room for the others in the rest.

A sketch is one tensor [n + r, r + 1]:

    Y  d
    C  0

Who reads one needs no Ω.
"""

import torch
from torch import Tensor

from merging.errors import MethodError

WIDE = 4
"""Inputs for each vector of a sketch, from which on a layer has one: a third of the bytes of the Gram."""
SIGNS = 4
"""Entries of each row of Ω that are not 0, but for those that fall on each other."""
TRIES = 4
"""Ridges on C of unit diagonal, each ten times the one before, from what float32 has of rounding."""


def is_sketch(value: Tensor) -> bool:
    """Whether a Gram, or several [E, …, …], is kept as a sketch."""
    return value.dim() >= 2 and value.shape[-1] != value.shape[-2]


def extents(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The shape [n, n] of the Gram that a tensor of this shape is, or stands for as a sketch; with a leading extent, if any."""
    inputs = shape[-2] if shape[-1] == shape[-2] else shape[-2] - shape[-1] + 1
    return (*shape[:-2], inputs, inputs)


def stored_shape(inputs: int, rank: int | None) -> tuple[int, int]:
    """How a Gram of so many inputs is kept: a sketch with `rank` vectors where it is wide enough, else whole."""
    return (inputs, inputs) if rank is None or inputs < WIDE * rank else (inputs + rank, rank + 1)


def random_vectors(inputs: int, rank: int) -> Tensor:
    """Ω [n, r] float32, the same in every process."""
    generator = torch.Generator().manual_seed(inputs)
    vectors = torch.zeros(inputs, rank)
    for _ in range(SIGNS):
        columns = torch.randint(rank, (inputs, 1), generator=generator)
        vectors.scatter_add_(1, columns, torch.randint(2, (inputs, 1), generator=generator).float() * 2 - 1)
    return vectors


def add_rows(sketch: Tensor, rows: Tensor, vectors: Tensor) -> None:
    """Adds rowsᵀ @ rows to a sketch.

    Args:
        sketch: […, n + r, r + 1], in place.
        rows: […, N, n].
        vectors: Ω [n, r], on the same device, in the same dtype.
    """
    inputs, seen = rows.shape[-1], rows @ vectors
    sketch[..., :inputs, :-1] += rows.mT @ seen
    sketch[..., inputs:, :-1] += seen.mT @ seen
    sketch[..., :inputs, -1] += rows.square().sum(-2)


def diagonal(gram: Tensor) -> Tensor:
    """A Gram's diagonal […, n], of a sketch, too."""
    return gram[..., : extents(gram.shape)[-1], -1] if is_sketch(gram) else gram.diagonal(dim1=-2, dim2=-1)


def dense(gram: Tensor) -> Tensor:
    """A Gram whole […, n, n]: of a sketch in float64 and positive semi-definite, any other as it is.

    Raises:
        MethodError: No Gram has such a sketch.
    """
    if not is_sketch(gram):
        return gram
    inputs = extents(gram.shape)[-1]
    wide = gram.double()
    products, core, exact = wide[..., :inputs, :-1], wide[..., inputs:, :-1], wide[..., :inputs, -1]
    sizes = core.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(sizes > 0, sizes, 1.0).rsqrt()
    core = (core + core.mT) / 2 * scale[..., :, None] * scale[..., None, :]
    ridge = torch.finfo(torch.float32).eps * core.shape[-1] ** 0.5
    for _ in range(TRIES):
        core.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, info = torch.linalg.cholesky_ex(core)
        if not info.any():
            break
        ridge *= 10
    else:
        raise MethodError("a Gram's sketch is not positive semi-definite: the file is damaged, compute the gram again")
    half = torch.linalg.solve_triangular(factor, (products * scale[..., None, :]).mT, upper=False)
    whole: Tensor = half.mT @ half
    own = whole.diagonal(dim1=-2, dim2=-1)
    own.add_((exact - own).clamp_(min=0))
    return whole
