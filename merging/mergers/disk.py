"""From a pool and a recipe to a merged checkpoint on disk, by many threads in bounded memory."""

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import CONFIG, Checkpoint
from merging.checkpoints.directories.writer import SHARD_BYTES, WeightFiles, Write, lay_out, new_checkpoint
from merging.checkpoints.pool import Pool
from merging.checkpoints.view import View
from merging.errors import MethodError, PoolError
from merging.io.direct_io import BLOCK
from merging.io.memory import available_memory
from merging.kernels.blockwise import Scratch, is_finite
from merging.mergers import running_statistics
from merging.mergers.material import Material, second_passes
from merging.mergers.partition import Part, partition, runs, side_by_side
from merging.mergers.resident import ResidentMerger, joined
from merging.mergers.running_statistics import parameters_of
from merging.mergers.weight_groups import split
from merging.methods import METHODS, Context, Method, Weight
from merging.recipe import Recipe

MEMORY = 1_000_000_000
"""Working memory, in bytes, where a caller names none."""
PART_ENTRIES = 1 << 22
"""Entries merged at a time where memory would allow more: few enough for what is merged to be written from the cache."""


def merge_to_disk(
    material: Material,
    recipe: Recipe,
    path: str,
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int = MEMORY,
    max_shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    extra: Mapping[str, str | bytes | None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Writes the merged model as a Hugging Face directory like the base's, whole or not at all.

    Local checkpoints are read by memory map, which is no memory of the process's own. A method that is elementwise, and
    any other up to its largest tensor, stays within `max_bytes` whatever the size of the model.

    Args:
        material: Pool and statistics.
        recipe: What to merge.
        path: The directory to write, local or an address; replaced if it exists.
        dtype: Of the merged weights; the base's by default.
        max_bytes: Working memory of all threads together.
        max_shard_bytes: An output file is closed before it exceeds this.
        threads: Parts merged side by side; by default as many as there are processors to this process.
        extra: Further small files, by their path below the directory; None leaves out the base's file of that name.
        progress: Told how many of how many entries are merged.

    Returns:
        The method's figures on this merge.

    Raises:
        MethodError: The recipe is wrong, or has no merge; nothing is written.
        PoolError: A member holds NaN or Inf; nothing is written.
        StorageError: There is no right or no space to write.
    """
    complete = material.check(recipe)
    merger = _Merger(_narrowed(material, complete), complete, dtype)
    pool = merger.pool
    threads = threads or len(os.sched_getaffinity(0))
    share = max(max_bytes // ((threads + 1) * 4 * (len(pool.members) + 1)), 1)
    outlines = [(name, merger.dtype(name), info.shape) for name, info in pool.base.tensors.items()]
    shards = lay_out(outlines, max_shard_bytes)
    parts = partition(pool, shards, min(share, PART_ENTRIES), chunks=merger.can_chunk)
    merger.global_pass(parts, share, threads)
    done, total = 0, sum(part.entries for part in parts)
    with new_checkpoint(path, shards, like=pool.base, extra=_small(pool, dtype, extra)) as files:
        writing = threads + 1  # one waits for the disk
        for entries in side_by_side(lambda run: merger.write(files, run), runs(parts, files), share, writing):
            done += entries
            progress(done, total)
    return merger.report


def merge_on_device(
    material: Material,
    recipe: Recipe,
    path: str,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    extra: Mapping[str, str | bytes | None] | None = None,
) -> dict[str, float]:
    """As `merge_to_disk`, with all weights merged on one device, whose memory base, members and merge must fit.

    Args:
        material: Pool and statistics.
        recipe: What to merge.
        path: The directory to write, local or an address; replaced if it exists.
        device: Where to merge.
        dtype: Of the merged weights; the base's by default.
        max_shard_bytes: An output file is closed before it exceeds this.
        extra: Further small files, by their path below the directory; None leaves out the base's file of that name.

    Returns:
        The method's figures on this merge.

    Raises:
        MethodError: The recipe is wrong, has no merge, or the device has too little memory; nothing is written.
        PoolError: A member holds NaN or Inf; nothing is written.
        StorageError: There is no right or no space to write.
    """
    complete = material.check(recipe)
    merger = _Merger(_narrowed(material, complete), complete, dtype)
    pool = merger.pool
    try:
        out = {
            name: torch.empty(info.shape, dtype=merger.dtype(name), device=device)
            for name, info in pool.weights.items()
        }
        report = ResidentMerger(merger.material, out).merge(complete)
    except torch.OutOfMemoryError as error:
        raise MethodError(
            f"base, {len(pool.members)} members and the merge do not fit into the memory of {device}: merge without it, on the "
            "CPU, in bounded memory"
        ) from error
    outlines = [(name, merger.dtype(name), info.shape) for name, info in pool.base.tensors.items()]
    shards = lay_out(outlines, max_shard_bytes)
    for part in partition(pool, shards, PART_ENTRIES, chunks=False):
        for name in part.names:
            if name in out and not is_finite(out[name]):
                raise merger.unusable(part, name)
    with new_checkpoint(path, shards, like=pool.base, extra=_small(pool, dtype, extra)) as files:
        for shard in shards:
            with files.open(shard) as put:
                for name, info in shard.tensors.items():
                    put(info.start, out[name].cpu().contiguous() if name in out else pool.base.read(name))
    return report


def _small(
    pool: Pool, dtype: torch.dtype | None, extra: Mapping[str, str | bytes | None] | None
) -> dict[str, str | bytes | None]:
    """The small files of a merge that are not as the base has them."""
    small: dict[str, str | bytes | None] = {**pool.files, **(extra or {})}
    if dtype is not None or isinstance(pool.base, View):
        small.setdefault(CONFIG, _config(pool.base, dtype))
    return small


def _config(base: Checkpoint, dtype: torch.dtype | None) -> str:
    """The base's `config.json` as the pool sees it, with the dtype of the merged weights, in which transformers loads them."""
    if dtype is None:
        return json.dumps(dict(base.config), indent=2) + "\n"
    word = str(dtype).removeprefix("torch.")
    old = {"torch_dtype": word} if "torch_dtype" in base.config else {}
    return json.dumps({**base.config, **old, "dtype": word}, indent=2) + "\n"


def _narrowed(material: Material, recipe: Recipe) -> Material:
    """The material of the members that take part."""
    pool = material.pool
    members = {name: pool.members[name] for name in recipe.members}
    statistics = {
        kind: {who: file for who, file in files.items() if who in members or who not in pool.members}
        for kind, files in material.statistics.items()
    }
    return replace(
        material,
        pool=replace(pool, members=members),
        statistics={kind: files for kind, files in statistics.items() if files},
    )


class _Merger:
    """One merge, part by part, in any thread.

    Args:
        material: Pool and statistics of the members that take part.
        recipe: The recipe, complete.
        dtype: Of the merged weights; the base's by default.
    """

    def __init__(self, material: Material, recipe: Recipe, dtype: torch.dtype | None) -> None:
        self.material = material
        self.pool = material.pool
        self.method = METHODS[recipe.method]
        self.report: dict[str, float] = {}
        self._recipe = recipe
        self._dtype = dtype
        self._global_stats: Any = None
        self._own = threading.local()
        self._lock = threading.Lock()
        checkpoints = self.pool.base, *(member.checkpoint for member in self.pool.members.values())
        self._stays_mapped = sum(c.nbytes for c in checkpoints) < available_memory() // 2
        self._is_cached = all(c.is_cached for c in checkpoints)

    @property
    def can_chunk(self) -> bool:
        """Whether a weight may be merged in chunks, and reading one costs no more than the chunk."""
        members = self.pool.members.values()
        sources = (self.pool.base, *(member.checkpoint for member in members))
        return self.method.is_elementwise(self._recipe.parameters) and all(c.is_mapped for c in sources)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is written."""
        stored = self.pool.base.tensors[name].dtype
        return self._dtype or stored if name in self.pool.weights else stored

    def global_pass(self, parts: Sequence[Part], share: int, threads: int) -> None:
        """Learns what the method must know of all weights before any is merged."""
        method, parameters = self.method, self._recipe.parameters
        alone = [[part] for part in parts if any(name in self.pool.weights for name in part.names)]
        if type(method).global_pass is not Method.global_pass:
            samples = side_by_side(lambda run: method.sample(self._read(run[0]), parameters), alone, share, threads)
            self._global_stats = reduce(method.combine, samples)

        def ask(known: Any) -> Iterator[Any]:
            return side_by_side(
                lambda run: method.second_pass(self._read(run[0]), known, parameters), alone, share, threads
            )

        self._global_stats = second_passes(method, self._global_stats, ask)

    def write(self, files: WeightFiles, run: Sequence[Part]) -> int:
        """Merges and writes some parts of one file.

        Returns:
            Number of entries merged.
        """
        with files.open(run[0].shard) as put:
            for part in run:
                self._announce(part)
                self._merge(part, put)
                self._leave(part)
        return sum(part.entries for part in run)

    def _read(self, part: Part) -> Iterator[Weight]:
        """A part's weights, for one look at them."""
        self._announce(part)
        yield from parameters_of(self._weights(part, part.names))
        self._leave(part)

    def _merge(self, part: Part, put: Write) -> None:
        """Merges a part in this thread's buffer, and hands it over."""
        out, extents = self._room(part)
        for names, scaling in split(out, self._recipe) if out else ():
            weights = list(self._weights(part, names))
            context = Context(self.material.examples, self._global_stats, self.pool.model_type)
            prepared = running_statistics.prepare(self.method, weights, context)
            prepared.merge(scaling, self._recipe.parameters, out)
            with self._lock:
                self.report = joined([self.report, prepared.report()])
        for name, value in out.items():
            if not is_finite(value):
                raise self.unusable(part, name)
        pieces: list[tuple[int, int, Tensor | str]] = [(place, value.nbytes, value) for place, value in extents]
        kept = [part.shard.tensors[name] for name in part.names if name not in out]
        pieces += [(info.start, info.nbytes, info.name) for info in kept]
        for place, _, piece in sorted(pieces, key=itemgetter(0, 1)):  # some files are written in order
            put(place, self.pool.base.read(piece) if isinstance(piece, str) else piece)

    def _weights(self, part: Part, names: Sequence[str]) -> Iterator[Weight]:
        """Those of a part's weights that are merged; of a chunk, views of base and members."""
        merged = [name for name in names if name in self.pool.weights]
        for weight in self.material.weights(merged, self.method.kinds, torch.device("cpu"), self.method.extras):
            if part.stop is None:
                yield weight
                continue

            def cut(value: Tensor) -> Tensor:
                return value.reshape(-1)[part.start : part.stop]

            yield replace(
                weight,
                base=cut(weight.base),
                members={member: cut(value) for member, value in weight.members.items()},
                statistics={k: {who: cut(v) for who, v in values.items()} for k, values in weight.statistics.items()},
                start=part.start,
            )

    def _room(self, part: Part) -> tuple[dict[str, Tensor], list[tuple[int, Tensor]]]:
        """What a part's merged weights are written to: this thread's, until its next part.

        They lie in memory as in the file, at the same distance from a block's start, so that they are written from there.

        Returns:
            The weights by name; places in the file, and the bytes that follow each other there.
        """
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        shapes = {name: self.pool.weights[name].shape for name in part.names if name in self.pool.weights}
        if part.stop is not None:
            shapes = dict.fromkeys(shapes, (part.entries,))
        places: list[tuple[str, int, int]] = []
        extents: list[list[int]] = []
        end = 0
        for name, shape in shapes.items():
            width = self.dtype(name).itemsize
            place, need = part.shard.tensors[name].start + part.start * width, torch.Size(shape).numel() * width
            if not extents or place != sum(extents[-1][::2]):
                end += (place - end) % BLOCK
                extents.append([place, end, 0])
            places.append((name, end, end + need))
            extents[-1][2] += need
            end += need
        room = self._own.scratch.take("out", end + BLOCK, device=torch.device("cpu"), dtype=torch.uint8)
        room = room[-room.data_ptr() % BLOCK :]
        out = {name: room[start:stop].view(self.dtype(name)).view(shapes[name]) for name, start, stop in places}
        return out, [(place, room[start : start + need]) for place, start, need in extents]

    def _announce(self, part: Part) -> None:
        """Has the system start to read a part, unless an earlier look left it mapped, or it is in memory anyway."""
        if not self._is_cached and not (self._stays_mapped and self._global_stats is not None):
            self._advise(part, mmap.MADV_WILLNEED)

    def _leave(self, part: Part) -> None:
        """Lets the system have a part's memory, unless there is plenty: another look would fault its pages in again."""
        if not self._stays_mapped:
            self._advise(part, mmap.MADV_DONTNEED)

    def _advise(self, part: Part, advice: int) -> None:
        """Tells the system what base and members will be read, or will not be for now."""
        for name in part.names:
            if name in self.pool.weights:
                for _, checkpoint, own in self._sources(name):
                    size = checkpoint.tensors[own].dtype.itemsize
                    stop = None if part.stop is None else part.stop * size
                    checkpoint.advise(own, advice, part.start * size, stop)

    def _sources(self, name: str) -> Iterator[tuple[str, Checkpoint, str]]:
        """Who has a weight, where, and by what name."""
        yield "base", self.pool.base, name
        for member in self.pool.members.values():
            yield member.name, member.checkpoint, member.names[name]

    def unusable(self, part: Part, name: str) -> Exception:
        """Why a merged weight is not finite."""
        for who, checkpoint, own in self._sources(name):
            if not is_finite(checkpoint.read(own).reshape(-1)[part.start : part.stop]):
                return PoolError(
                    f"unusable weights:\n  - {who}: '{name}' holds NaN or Inf\nCopy the checkpoint again, or leave it out"
                )
        return MethodError(
            f"'{name}' merges to numbers beyond {self.dtype(name)}, though base and members are finite: use smaller scaling "
            "factors, or another dtype"
        )
