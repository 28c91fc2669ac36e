"""A model cut into parts that threads merge side by side, and that bound what is held at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from merging.checkpoints.directories.writer import FileLayout, WeightFiles
from merging.checkpoints.pool import Pool

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Some tensors that follow each other in an output file, or a chunk of one; the unit of work.

    Args:
        shard: The output file.
        names: The base's names of the tensors.
        start: Flat index of the first entry; other than 0 only with one tensor.
        stop: Flat index after the last entry; None for whole tensors.
        entries: Number of entries to merge.
    """

    shard: FileLayout
    names: tuple[str, ...]
    entries: int
    start: int = 0
    stop: int | None = None


def partition(pool: Pool, shards: Sequence[FileLayout], most: int, *, chunks: bool) -> list[Part]:
    """All tensors of the output files, cut into parts.

    Args:
        pool: Base and members.
        shards: Layout of the output files.
        most: Entries of a part.
        chunks: Cut larger weights into chunks, instead of giving each a part of its own.
    """
    parts: list[Part] = []
    for shard in shards:
        names: list[str] = []
        filled = 0
        for name, info in shard.tensors.items():
            size = info.nbytes // info.dtype.itemsize if name in pool.weights else 0
            if names and filled + size > most:
                parts.append(Part(shard, tuple(names), filled))
                names, filled = [], 0
            if chunks and size > most:
                for start in range(0, size, most):
                    stop = min(start + most, size)
                    parts.append(Part(shard, (name,), stop - start, start, stop))
            else:
                names.append(name)
                filled += size
        if names:
            parts.append(Part(shard, tuple(names), filled))
    return parts


def runs(parts: Sequence[Part], files: WeightFiles) -> list[list[Part]]:
    """Parts that one thread merges one after another: those of a file that must be written in order."""
    if not files.in_order:
        return [[part] for part in parts]
    return [[part for part in parts if part.shard is shard] for shard in files.shards]


def side_by_side(
    work: Callable[[list[Part]], Result], runs: Sequence[list[Part]], share: int, threads: int
) -> Iterator[Result]:
    """The results of `work` on every run, in their order.

    Runs with a part of more than `share` entries come first and alone, with all of torch's threads on each; the others
    side by side, with one thread each.
    """
    large = [run for run in runs if max(part.entries for part in run) > share]
    small = [run for run in runs if max(part.entries for part in run) <= share]
    yield from map(work, large)
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for future in [executor.submit(work, run) for run in small]:
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
