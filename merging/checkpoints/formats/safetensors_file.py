"""A safetensors file: where its tensors lie, read one by one, by memory map or on their way from elsewhere."""

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.checkpoints.formats.safetensors_header import MAX_HEADER, parse_header
from merging.errors import CheckpointError, StorageError
from merging.io import addresses, local_copies, storage
from merging.io.prefetch import Window

SAMPLED = 64
"""Places of a file that tell whether all of it is in memory."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `file`, bytes [start, stop) in it, and what they are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file's header: metadata and where each tensor lies.

    Args:
        path: The file's path or address.
        metadata: The header's `__metadata__`.
        tensors: Name to place, in file order.
    """

    path: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str) -> "SafetensorsFile":
        """Reads and checks a header.

        Raises:
            CheckpointError: The file is missing, truncated, or not safetensors.
        """
        try:
            size = storage.size(path)
            (length,) = struct.unpack("<Q", storage.read_bytes(path, 0, 8)) if size >= 8 else (size,)
            if length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path} is truncated or not a safetensors file: copy it again")
            raw = storage.read_bytes(path, 8, 8 + length)
        except (StorageError, struct.error) as error:
            raise CheckpointError(str(error)) from error
        data = 8 + length
        metadata, entries = parse_header(raw, size - data, path)
        tensors = {
            name: TensorInfo(name, entry.dtype, entry.shape, path, data + entry.start, data + entry.stop)
            for name, entry in entries.items()
        }
        return cls(path, metadata, tensors)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: not the bytes that this one has mapped, nor where its machine keeps a copy."""
        return {field: self.__dict__[field] for field in ("path", "metadata", "tensors")}

    @cached_property
    def _map(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of the local file or copy, mapped copy-on-write, so that nothing can write through."""
        assert self._here is not None
        return np.memmap(self._here, dtype=np.uint8, mode="c")

    @cached_property
    def _here(self) -> Path | None:
        """The file itself, or this machine's copy of a remote one, if there was one when it was last looked for."""
        return addresses.local_path(self.path) if addresses.is_local(self.path) else local_copies.copy_of(self.path)

    def copy_here(self) -> None:
        """Makes this machine's copy of a remote file, for all its processes, if there is room; then `read` maps it."""
        self._use(local_copies.made)

    def find_copy(self) -> None:
        """Looks once more for a copy of a remote file, which another process may have made meanwhile."""
        self._use(local_copies.copy_of)

    def _use(self, copy_of: Callable[[str], Path | None]) -> None:
        if self._here is None and (copy := copy_of(self.path)) is not None:
            self.__dict__["_here"] = copy

    @cached_property
    def _window(self) -> Window:
        """What is on its way of a remote file."""
        return Window(self.path)

    def prefetch(self, names: Iterable[str]) -> None:
        """Says that these tensors are about to be read, best in this order; of a remote file, they are sent for now."""
        if self._here is None:
            infos = [self.tensors[name] for name in names]
            self._window.prefetch([(info.start, info.stop) for info in infos if info.nbytes])

    @property
    def is_cached(self) -> bool:
        """Whether the system seems to hold a local file in memory, by a look at some places."""
        if self._here is None:
            return False
        with self._here.open("rb", buffering=0) as file:
            last, byte = self._here.stat().st_size - 1, bytearray(1)
            try:
                return all(
                    os.preadv(file.fileno(), [byte], last * n // SAMPLED, os.RWF_NOWAIT) for n in range(SAMPLED + 1)
                )
            except OSError:  # it would have to be read, or the file system cannot tell
                return False

    def advise(self, name: str, advice: int, start: int = 0, stop: int | None = None) -> None:
        """Tells the system about the use of bytes [start, stop) of a local file's tensor, all by default.

        Args:
            name: The tensor.
            advice: `mmap.MADV_WILLNEED` to start reading them, `mmap.MADV_DONTNEED` to give up their memory.
            start: First byte of the tensor.
            stop: End, in the tensor.
        """
        info = self.tensors[name]
        first = (info.start + start) // mmap.PAGESIZE * mmap.PAGESIZE
        last = info.stop if stop is None else info.start + stop
        if last > first:
            self._map._mmap.madvise(advice, first, last - first)  # type: ignore[attr-defined]

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU; of a local file or copy, a view of a private memory map; else in memory of its own.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        info = self.tensors[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._here is not None:
            raw = torch.from_numpy(self._map[info.start : info.stop])
        else:
            raw = torch.frombuffer(self._window.take(info.start, info.stop), dtype=torch.uint8)
        return raw.view(info.dtype).reshape(info.shape)


def read_arrays(path: str) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a small safetensors file, as arrays in memory of their own.

    Raises:
        CheckpointError: The file is missing, truncated, or not safetensors.
    """
    file = SafetensorsFile.open(path)
    values = {name: file.read(name) for name in file.tensors}
    has_numpy = (torch.float64, torch.float32, torch.int64, torch.int32, torch.bool)
    return {name: np.array((v if v.dtype in has_numpy else v.double()).numpy()) for name, v in values.items()}
