"""A model directory in the making: its layout is known before any weight is, so that all can be written at once."""

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from merging.checkpoints.directories.companions import companions
from merging.checkpoints.directories.manifest import MANIFEST, manifest, require_replaceable, written
from merging.checkpoints.formats.safetensors_file import TensorInfo
from merging.checkpoints.formats.safetensors_header import DTYPES
from merging.io import addresses, atomic, storage
from merging.io.direct_io import BLOCK, UnbufferedFile

SHARD_BYTES = 4 << 30
"""A file is closed before it exceeds this."""
Outline = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to be written: name, dtype, shape."""
Write = Callable[[int, Tensor], None]
"""(byte offset in the file, contiguous CPU tensor whose bytes are written there)"""


@dataclass(frozen=True)
class FileLayout:
    """A safetensors file before it is written.

    Args:
        name: The file's name.
        header: What stands before the tensors' bytes.
        tensors: Where each tensor will lie, in file order.
    """

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((info.stop for info in self.tensors.values()), default=len(self.header))


def lay_out(outlines: Sequence[Outline], max_bytes: int = SHARD_BYTES) -> tuple[FileLayout, ...]:
    """Consecutive tensors in files that stay below `max_bytes`, unless one tensor does not.

    Within a file, tensors with wider entries come first, so that each is aligned to its own width.
    """
    groups: list[list[Outline]] = [[]]
    filled = 0
    for outline in outlines:
        need = _nbytes(outline)
        if groups[-1] and filled + need > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(outline)
        filled += need
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return tuple(
        layout(name, sorted(group, key=lambda outline: -outline[1].itemsize))
        for name, group in zip(names if len(groups) > 1 else [SINGLE], groups, strict=True)
    )


def _nbytes(outline: Outline) -> int:
    return torch.Size(outline[2]).numel() * outline[1].itemsize


def layout(file: str, outlines: Sequence[Outline], metadata: Mapping[str, str] = {"format": "pt"}) -> FileLayout:
    """The layout of one file (the safetensors format: length of the header, header as JSON, bytes of the tensors)."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    stops: list[int] = []
    for name, dtype, shape in outlines:
        start = stops[-1] if stops else 0
        stops.append(start + _nbytes((name, dtype, shape)))
        entries[name] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [start, stops[-1]]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)  # tensors begin with a block, in the file and in whoever maps it
    header = struct.pack("<Q", len(text)) + text
    starts = [0, *stops[:-1]]
    return FileLayout(
        file,
        header,
        {
            name: TensorInfo(name, dtype, shape, file, len(header) + start, len(header) + stop)
            for (name, dtype, shape), start, stop in zip(outlines, starts, stops, strict=True)
        },
    )


class WeightFiles(ABC):
    """The weight files of a checkpoint that is being written.

    Args:
        shards: Their layout.
    """

    in_order: bool
    """Whether a file's bytes must be written from its first to its last."""

    def __init__(self, shards: tuple[FileLayout, ...]) -> None:
        self.shards = shards

    @abstractmethod
    def open(self, shard: FileLayout) -> AbstractContextManager[Write]:
        """A context in which a file's tensors are written; it ends when all its bytes are."""


class LocalFiles(WeightFiles):
    """Files whose space is taken at once, so that threads write to any place, and a full disk is found at the start.

    Args:
        shards: Their layout.
        directory: Where they lie.
    """

    in_order = False

    def __init__(self, shards: tuple[FileLayout, ...], directory: Path) -> None:
        super().__init__(shards)
        self._files: dict[str, UnbufferedFile] = {}
        try:
            for shard in shards:
                self._files[shard.name] = UnbufferedFile(directory / shard.name)
                self._files[shard.name].reserve(shard.size)
                self._files[shard.name].write(0, memoryview(shard.header))
        except BaseException:
            self.close(complete=False)
            raise

    @contextmanager
    def open(self, shard: FileLayout) -> Iterator[Write]:
        """Any number of threads may write to a file."""
        file = self._files[shard.name]
        yield lambda place, value: file.write(place, raw_bytes(value))

    def close(self, *, complete: bool) -> None:
        """Makes what was written durable, if it is complete, and closes the files."""
        try:
            if complete:
                with ThreadPoolExecutor(max_workers=8) as threads:
                    list(threads.map(UnbufferedFile.finish, self._files.values()))
        finally:
            for file in self._files.values():
                file.close()
            self._files.clear()


class RemoteFiles(WeightFiles):
    """Files that are uploaded while they are written, each as one stream.

    Args:
        shards: Their layout.
        path: Address of the directory.
    """

    in_order = True

    def __init__(self, shards: tuple[FileLayout, ...], path: str) -> None:
        super().__init__(shards)
        self._path = path

    @contextmanager
    def open(self, shard: FileLayout) -> Iterator[Write]:
        """The file appears when the block ends well."""
        with atomic.open_new(addresses.join(self._path, shard.name)) as stream:
            stream.write(shard.header)
            place = len(shard.header)

            def write(offset: int, value: Tensor) -> None:
                nonlocal place
                if offset != place:
                    raise ValueError(f"{shard.name} is at byte {place}, and cannot go on at {offset}")
                place += stream.write(raw_bytes(value))

            yield write


@contextmanager
def new_checkpoint(
    path: str,
    shards: tuple[FileLayout, ...],
    *,
    like: Checkpoint,
    extra: Mapping[str, str | bytes | None] | None = None,
) -> Iterator[WeightFiles]:
    """A model directory that is there when the block ends well, and not otherwise.

    A local one is a neighbour under another name until then; an earlier merge at `path` is replaced. Elsewhere nothing
    can be renamed: what makes a directory a checkpoint, `config.json`, goes first and comes last.

    Args:
        path: The directory.
        shards: What will be in the block written, all of it.
        like: The checkpoint whose configuration, tokenizer and other companion files are copied.
        extra: Further small files, by their path below the directory (a model card, a task's head); None leaves out the
            base's file of that name.

    Raises:
        StorageError: There is no right or no space to write, or something else than an earlier merge is there.
    """
    require_replaceable(path)
    small = _small_files(shards, like, extra or {})
    small = {MANIFEST: manifest({shard.name: shard.size for shard in shards}, small), **small}
    if not addresses.is_local(path):
        for name in sorted(written(path), key=lambda name: name != CONFIG):
            storage.remove(addresses.join(path, name))
        # first, so that what a killed merge leaves is known
        atomic.write_bytes(addresses.join(path, MANIFEST), small.pop(MANIFEST))
        yield RemoteFiles(shards, path)
        for name, content in small.items():
            atomic.write_bytes(addresses.join(path, name), content)
        return
    with atomic.new_dir(path) as directory:
        files = LocalFiles(shards, directory)
        complete = False
        try:
            yield files
            complete = True
        finally:
            files.close(complete=complete)
        for name, content in small.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)


def _small_files(
    shards: Sequence[FileLayout], like: Checkpoint, extra: Mapping[str, str | bytes | None]
) -> dict[str, bytes]:
    """All files of a model directory but its weights; `config.json` is the last."""
    contents: dict[str, bytes] = {}
    if len(shards) > 1:
        total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        contents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    given = {name: content.encode() if isinstance(content, str) else content for name, content in extra.items()}
    for name in companions(like.path)[0]:
        if name not in given:
            contents[name] = storage.read_bytes(addresses.join(like.path, name))
    contents |= {name: content for name, content in given.items() if content is not None}
    contents = {name: _without_code(name, content) for name, content in contents.items()}
    return {**{name: content for name, content in contents.items() if name != CONFIG}, CONFIG: contents[CONFIG]}


def _without_code(name: str, content: bytes) -> bytes:
    """A file's content without `auto_map`, which names code, perhaps of somebody else's repository, to be run on loading."""
    if not name.endswith(".json") or b"auto_map" not in content:
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(value, dict) or "auto_map" not in value:
        return content
    kept = {key: part for key, part in value.items() if key != "auto_map"}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def raw_bytes(value: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes."""
    return value.reshape(-1).view(torch.uint8).numpy().data
