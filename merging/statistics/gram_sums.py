"""Sums of rowsᵀ @ rows, half of which follows from the other half, and the statistics that are made of them."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, float32, nn, promote_types

from merging.kernels.gram_sketch import add_rows, is_sketch, random_vectors, stored_shape
from merging.statistics.capture.layers import means, real_rows, token_count
from merging.statistics.capture.linear_calls import UnaccountableRowsError
from merging.statistics.statistic import Partial, Statistic
from merging.tasks.task import Batch, Task

LEAST_BLOCK = {"cpu": 256}
"""Blocks on the diagonal that are no longer worth cutting; elsewhere `LEAST_BLOCK_ELSEWHERE`."""
LEAST_BLOCK_ELSEWHERE = 1024


class GramSums:
    """Accumulates Grams by name, and the number of rows in each.

    Args:
        rank: Vectors of the sketch that stands for the Gram of a wide layer; None keeps all Grams whole.
    """

    def __init__(self, rank: int | None = None) -> None:
        self._rank = rank
        self._vectors: dict[int, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts = {"examples": 0, "tokens": 0}

    def add(self, name: str, value: Tensor, mask: Tensor | None, *, counted: bool = True, dimensions: int = 1) -> None:
        """Adds the Gram of a tensor's real rows.

        Args:
            name: Which Gram.
            value: […, D], or […, groups, D], which has a Gram for each group.
            mask: Which positions are real tokens, or None.
            counted: Whether the rows are new ones (and not the same tokens' for another class).
            dimensions: How many of the last dimensions belong to a row.
        """
        rows = real_rows(value, mask, dimensions)
        rows = rows.to(promote_types(rows.dtype, float32))
        if name not in self._sums:
            self._sums[name] = rows.new_zeros(*rows.shape[1:-1], *stored_shape(rows.shape[-1], self._rank))
        if is_sketch(self._sums[name]):
            add_rows(self._sums[name], rows if dimensions == 1 else rows.transpose(0, 1), self._random_vectors(rows))
        elif dimensions == 1:
            _add_upper(self._sums[name], rows)
        else:
            by_group = rows.transpose(0, 1)
            self._sums[name].baddbmm_(by_group.mT, by_group)
        self._counts[name] = self._counts.get(name, 0) + (len(rows) if counted else 0)

    def count(self, batch: Batch) -> None:
        """Counts a batch's examples and tokens."""
        self._counts["examples"] += len(batch.indices)
        self._counts["tokens"] += token_count(batch)

    def partial(self, shared: dict[str, str], transposed: tuple[str, ...]) -> Partial:
        """What was accumulated, on the CPU, and is no longer here; `transposed` restricted to names that have a Gram."""
        if not self._counts["examples"]:
            return Partial()
        sums = {}
        for name in list(self._sums):  # one after another, so that no second copy of all is there
            value = self._sums.pop(name)
            sums[name] = value.cpu() if is_sketch(value) else (value.triu() + value.triu(1).mT).cpu()
        named = tuple(name for name in transposed if name in sums or name in shared)
        return Partial(sums, self._counts, shared=shared, transposed=named)

    def nothing(self, inputs: int) -> Tensor:
        """The sum over no rows."""
        return torch.zeros(stored_shape(inputs, self._rank))

    def _random_vectors(self, rows: Tensor) -> Tensor:
        """Those for layers with as many inputs as these rows, made once."""
        assert self._rank is not None
        inputs = rows.shape[-1]
        if inputs not in self._vectors:
            self._vectors[inputs] = random_vectors(inputs, self._rank)
        self._vectors[inputs] = self._vectors[inputs].to(rows)
        return self._vectors[inputs]


class GramStatistic(Statistic):
    """Grams of what linear layers read, or of gradients at what they put out, at real tokens."""

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """Batch by batch, or example by example where single examples' rows cannot be told in a batch.

        Of the first batch two examples run twice more, and once backward, to find that out.

        Raises:
            StatisticsError: See `accumulate`.
        """
        again = list(batches) if iter(batches) is batches else batches
        try:
            return self.accumulate(model, task, again, alone=False)
        except UnaccountableRowsError:
            return self.accumulate(model, task, again, alone=True)

    @abstractmethod
    def accumulate(self, model: nn.Module, task: Task, batches: Iterable[Batch], *, alone: bool) -> Partial:
        """The sums over some batches.

        Args:
            model: See `measure`.
            task: See `measure`.
            batches: On the CPU.
            alone: Run every example by itself, without padding.

        Raises:
            UnaccountableRowsError: Rows of padding cannot be told, and the examples do not run alone.
        """

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """Means over real tokens, float32 [D, D], or [groups, D, D], by the weight's name, without those of `shared` names.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """
        return means(self.kind, partial)


def _add_upper(out: Tensor, rows: Tensor) -> None:
    """Adds rowsᵀ @ rows to `out` [D, D], below the diagonal only within small blocks: about half the work."""
    half = out.shape[0] // 2
    if 2 * half <= LEAST_BLOCK.get(out.device.type, LEAST_BLOCK_ELSEWHERE):
        out.addmm_(rows.T, rows)
        return
    _add_upper(out[:half, :half], rows[:, :half])
    out[:half, half:].addmm_(rows[:, :half].T, rows[:, half:])
    _add_upper(out[half:, half:], rows[:, half:])
