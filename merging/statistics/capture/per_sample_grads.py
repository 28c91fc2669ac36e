"""Gradients of single examples, in the form that each kind of layer gives them, and sums of their squares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 22}
"""Bytes of gradients that are held at once; elsewhere `LARGE_CHUNK`."""
BLOCK_BYTES = {"cpu": 1 << 19}
"""The same of blocks of rows, which are squared as they come from a matrix product: what stays in a CPU core's own cache."""
LARGE_CHUNK = 1 << 28


class GradientTerm(Protocol):
    """What one use of a parameter contributes to each of N examples' gradients of it."""

    def add_to(self, out: Tensor, start: int) -> None:
        """Adds the gradients of examples [start, start + n) to `out` [n, *parameter's shape]."""


@dataclass(frozen=True)
class Outer:
    """A linear map's weight [R, C]: example n has left[n]ᵀ @ right[n], of [N, S, R] and [N, S, C]."""

    left: Tensor
    right: Tensor

    def add_to(self, out: Tensor, start: int) -> None:
        """See `GradientTerm`."""
        stop = start + len(out)
        out.flatten(2).baddbmm_(self.left[start:stop].transpose(1, 2), self.right[start:stop])


@dataclass(frozen=True)
class TableGradient:
    """A table's weight [V, D]: example n adds values[n, s] to row ids[n, s]; `values` [N, S, D]."""

    ids: Tensor
    values: Tensor

    def add_to(self, out: Tensor, start: int) -> None:
        """See `GradientTerm`."""
        n, rows, _ = out.shape
        first = torch.arange(n, device=out.device)[:, None] * rows
        places = (first + self.ids[start : start + n]).flatten()
        out.view(n * rows, -1).index_add_(0, places, self.values[start : start + n].flatten(0, 1))


@dataclass(frozen=True)
class Dense:
    """Any parameter's gradients as they are: `values` [N, *shape]."""

    values: Tensor

    def add_to(self, out: Tensor, start: int) -> None:
        """See `GradientTerm`."""
        out += self.values[start : start + len(out)]


@dataclass(frozen=True)
class Computed:
    """Gradients that are computed when asked for: `between(start, stop)` gives [stop − start, *shape]."""

    between: Callable[[int, int], Tensor]

    def add_to(self, out: Tensor, start: int) -> None:
        """See `GradientTerm`."""
        out += self.between(start, start + len(out))


def add_squares(pieces: Sequence[GradientTerm], examples: int, out: Tensor) -> None:
    """Adds Σ_n (Σ_pieces gradient_n)² to `out`: uses of one parameter are summed before they are squared.

    Args:
        pieces: One for each use of the parameter.
        examples: N.
        out: In the parameter's shape, contiguous.
    """
    outer = [piece for piece in pieces if isinstance(piece, Outer)]
    rows = [piece for piece in pieces if isinstance(piece, TableGradient)]
    if outer and len(outer) + len(rows) == len(pieces):
        _add_outer(_joined([piece.left for piece in outer]), _joined([piece.right for piece in outer]), rows, out)
    elif len(rows) == len(pieces):
        _add_rows(_joined([piece.ids for piece in rows]), _joined([piece.values for piece in rows]), out)
    else:
        step = _chunk(out)
        for start in range(0, examples, step):
            gradient = out.new_zeros(min(step, examples - start), *out.shape)
            for piece in pieces:
                piece.add_to(gradient, start)
            out += gradient.square_().sum(0)


def weighted_product(pieces: Sequence[GradientTerm], weights: Tensor, parameter: Tensor, vectors: Tensor) -> Tensor:
    """G @ vectors [R, K], G = Σ_n weights_n Σ_pieces gradient_n [R, C] as `as_matrix` has it, which is never held itself.

    Args:
        pieces: One for each use of the parameter.
        weights: One number an example [N].
        parameter: The parameter.
        vectors: [C, K].
    """
    rows = as_matrix(parameter).shape[0]
    out = vectors.new_zeros(rows, vectors.shape[1])
    by_example = weights[:, None, None]
    for piece in pieces:
        if isinstance(piece, Outer):
            out.addmm_((piece.left * by_example).flatten(0, 1).T, piece.right.flatten(0, 1) @ vectors)
        elif isinstance(piece, TableGradient):
            out.index_add_(0, piece.ids.flatten(), (piece.values * by_example).flatten(0, 1) @ vectors)
        else:
            step = _chunk(parameter)
            for start in range(0, len(weights), step):
                part = weights[start : start + step]
                gradient = parameter.new_zeros(len(part), *parameter.shape)
                piece.add_to(gradient, start)
                out += torch.tensordot(part, gradient.reshape(len(part), rows, -1) @ vectors, 1)
    return out


def as_matrix(value: Tensor) -> Tensor:
    """A parameter, or its gradient, [R, C]: all but its first dimension in one; [entries, 1] of what has no second."""
    return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _chunk(out: Tensor) -> int:
    """How many examples' gradients of a parameter are held at once."""
    return max(1, CHUNK_BYTES.get(out.device.type, LARGE_CHUNK) // max(1, out.nbytes))


def _add_outer(left: Tensor, right: Tensor, tables: Sequence[TableGradient], out: Tensor) -> None:
    """Σ_n (left_nᵀ @ right_n + what tables add)²; of a single position the square of a product is the product of squares.

    In blocks of `out`'s rows, so that no example's gradient of a large weight is ever held whole, and each is squared while
    it is in the cache.
    """
    matrix = out.flatten(1)
    if left.shape[1] == 1 and not tables:
        matrix.addmm_(left[:, 0].square().T, right[:, 0].square())
        return
    budget = BLOCK_BYTES.get(out.device.type, LARGE_CHUNK)
    step = max(1, budget // max(1, out.nbytes))
    height = len(matrix) if step > 1 else max(1, budget // max(1, matrix[0].nbytes))
    entries = [_Entries.of(table, len(matrix), height) for table in tables]
    for number, first in enumerate(range(0, len(matrix), height)):
        block = matrix[first : first + height]
        for start in range(0, len(left), step):
            rows = left[start : start + step, :, first : first + height]
            gradient = torch.bmm(rows.transpose(1, 2), right[start : start + step])
            for some in entries:
                some.add_to(gradient, start, number)
            if len(gradient) == 1:
                block.addcmul_(gradient[0], gradient[0])
            else:
                block += gradient.square_().sum(0)


@dataclass(frozen=True)
class _Entries:
    """A table's gradients in the order of their rows, to be found by blocks of these.

    Args:
        order: Example by example, the places of its ids in ascending order [N, S].
        ids: The ids in that order [N, S].
        ends: Example by example, how many ids lie before each block, and before the end.
        height: Rows of a block.
        table: Where they are from.
    """

    order: Tensor
    ids: Tensor
    ends: Sequence[Sequence[int]]
    height: int
    table: TableGradient

    @classmethod
    def of(cls, table: TableGradient, rows: int, height: int) -> "_Entries":
        """Sorts a table's [rows, D], in blocks of so many rows."""
        ids, order = table.ids.sort(dim=1)
        edges = torch.arange(0, rows + height, height, device=ids.device).expand(len(ids), -1).contiguous()
        return cls(order, ids, torch.searchsorted(ids, edges).tolist(), height, table)

    def add_to(self, out: Tensor, start: int, number: int) -> None:
        """Adds to `out` [n, H, D] what the rows of a block have of examples [start, start + n)."""
        for n, gradient in enumerate(out, start):
            low, high = self.ends[n][number : number + 2]
            if low < high:
                rows = self.ids[n, low:high] - number * self.height
                gradient.index_add_(0, rows, self.table.values[n, self.order[n, low:high]])


def _add_rows(ids: Tensor, values: Tensor, out: Tensor) -> None:
    """Σ_n (Σ_s values[n, s] at row ids[n, s])², touching only the rows that occur."""
    first = torch.arange(len(ids), device=ids.device)[:, None] * len(out)
    places, inverse = torch.unique(first + ids, return_inverse=True)
    gradient = out.new_zeros(len(places), out.shape[1])
    gradient.index_add_(0, inverse.flatten(), values.flatten(0, 1))
    out.index_add_(0, places % len(out), gradient.square_())
