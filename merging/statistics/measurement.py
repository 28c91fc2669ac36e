"""A statistic that is measured of shard after shard in one sum, where its numbers stay."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import nn

from merging.statistics.capture.layers import device_of
from merging.statistics.statistic import Partial, Statistic
from merging.tasks.task import Batch, Split, Task

Shard = tuple[int, int]
"""Examples from the first position to the one after the last."""


class Measurement:
    """One sum, to which shards of examples are added as they come.

    `Statistic.measure` runs in a thread of its own and waits for the next shard where one ends, so that it looks at a model
    once, and adds to what it has: there is no second sum beside the first.

    Args:
        statistic: What to measure.
        task: Gives the examples.
        split: Which of them.
        model: In evaluation mode, on the device to use.
    """

    def __init__(self, statistic: Statistic, task: Task, split: Split, model: nn.Module) -> None:
        self._statistic, self._task, self._split, self._model = statistic, task, split, model
        self._feed: _Feed | None = None
        self._running = Future[Partial]()
        self._ended = Partial()

    def add(self, start: int, stop: int) -> None:
        """Adds examples [start, stop), which must not be among those before.

        Raises:
            StatisticsError: The statistic does not fit the task or the model.
            TaskError: The task's data cannot be read.
        """
        if self._feed is None:
            self._feed = _Feed(self._statistic, self._task, self._split)
            self._running = Future()
            device, threads = device_of(self._model), torch.get_num_threads()
            threading.Thread(target=self._run, args=(self._feed, self._running, device, threads), daemon=True).start()
        self._feed.shards.put((start, stop))
        self._feed.ended.get()
        if self._running.done():
            self._end()

    def partial(self) -> Partial:
        """The sum of all shards so far."""
        if self._feed is not None:
            self._feed.shards.put(None)
            self._end()
        return self._ended

    def close(self) -> None:
        """Ends the thread, if it has not ended."""
        if self._feed is not None:
            self._feed.shards.put(None)

    def _end(self) -> None:
        self._feed = None
        self._ended = self._ended.combine(self._running.result())

    def _run(self, feed: "_Feed", result: Future[Partial], device: torch.device, threads: int) -> None:
        try:
            torch.set_num_threads(threads)  # of this thread, as is the device
            if device.type == "cuda":
                torch.cuda.set_device(device)
            result.set_result(self._statistic.measure(self._model, self._task, feed))
        except BaseException as error:
            result.set_exception(error)
        finally:
            feed.ended.put(None)


class _Feed:
    """Batches of the shards that come; whoever begins anew has those before once more."""

    def __init__(self, statistic: Statistic, task: Task, split: Split) -> None:
        self.shards: SimpleQueue[Shard | None] = SimpleQueue()
        self.ended: SimpleQueue[None] = SimpleQueue()
        self._batch_size, self._task, self._split = int(statistic.settings.batch_size), task, split
        self._before: list[Shard] = []
        self._current: Shard | None = None

    def __iter__(self) -> Iterator[Batch]:
        for before in tuple(self._before):
            yield from self._batches(before)
        while (shard := self._current or self.shards.get()) is not None:
            self._current = shard
            yield from self._batches(shard)
            self._before.append(shard)
            self._current = None
            self.ended.put(None)

    def _batches(self, shard: Shard) -> Iterator[Batch]:
        return iter(self._task.batches(self._split, *shard, self._batch_size))
