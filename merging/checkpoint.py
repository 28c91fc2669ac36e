"""A Hugging Face model directory: its configuration and its tensors, read one by one from safetensors files."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging import storage
from merging.errors import CheckpointError, StorageError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_HEADER = 100_000_000
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "*tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "spiece.model",
    "sentencepiece*.model",
)

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
            header: dict[str, Any] = json.loads(storage.read_bytes(path, 8, 8 + length))
        except StorageError as error:
            raise CheckpointError(str(error)) from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not a safetensors file: its header is damaged ({error})") from error
        tensors = {}
        try:
            metadata = header.pop("__metadata__", {})
            for name, entry in header.items():
                dtype = DTYPES[entry["dtype"]]
                start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
                shape = tuple(int(extent) for extent in entry["shape"])
                if stop > size:
                    raise CheckpointError(
                        f"{path} is truncated: '{name}' ends at byte {stop:,} of {size:,}: copy the file again"
                    )
                if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != stop - start or start < 8 + length:
                    raise CheckpointError(f"{path} is damaged: the header's entry of '{name}' contradicts itself")
                tensors[name] = TensorInfo(name, dtype, shape, path, start, stop)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} has a header that cannot be understood ({error!r})") from error
        return cls(path, metadata, tensors)

    @cached_property
    def _map(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The local file's bytes, mapped copy-on-write, so that nothing can write through."""
        return np.memmap(storage.local_path(self.path), dtype=np.uint8, mode="c")

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU; of a local file, a view of a private memory map.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        info = self.tensors[name]
        if storage.is_local(self.path):
            raw = torch.from_numpy(self._map[info.start : info.stop])
        else:
            raw = torch.frombuffer(bytearray(storage.read_bytes(self.path, info.start, info.stop)), dtype=torch.uint8)
        return raw.view(info.dtype).reshape(info.shape) if raw.numel() else torch.empty(info.shape, dtype=info.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory, local or at an fsspec address.

    Args:
        path: The directory.
        config: `config.json`.
        tensors: Name to place, over all safetensors files.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    _files: Mapping[str, SafetensorsFile] = field(repr=False)

    @classmethod
    def open(cls, path: str) -> "Checkpoint":
        """Opens a model directory: reads its configuration and headers, no weights.

        Raises:
            CheckpointError: It is missing, incomplete, damaged, an adapter, a pickle, or names a file outside itself.
        """
        if not storage.is_dir(path):
            raise CheckpointError(
                f"there is no checkpoint directory at {path}. Models are read from Hugging Face directories "
                "(config.json + safetensors); `hf download NAME --local-dir DIR` makes one"
            )
        listed = storage.list_dir(path)
        if CONFIG not in listed:
            adapter = " It is an adapter: merge it into its base model first" if "adapter_config.json" in listed else ""
            raise CheckpointError(f"{path} has no config.json, so it is not a Hugging Face model directory.{adapter}")
        try:
            config = storage.read_json(storage.join(path, CONFIG))
        except StorageError as error:
            raise CheckpointError(str(error)) from error
        files = [SafetensorsFile.open(storage.join(path, name)) for name in _weight_files(path, listed)]
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            if twice := tensors.keys() & file.tensors.keys():
                raise CheckpointError(f"{path}: '{min(twice)}' stands in two of its files")
            tensors.update(file.tensors)
        return cls(path, config, tensors, {file.path: file for file in files})

    @property
    def architecture(self) -> str:
        """The configuration's first architecture, or its model type."""
        return str((self.config.get("architectures") or [self.config.get("model_type", "unknown")])[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in its stored dtype.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        return self._files[self.tensors[name].file].read(name)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of names, dtypes, shapes and bytes, whatever files they are cut into.

        Of a remote checkpoint, the files' own checksums stand for their bytes, so that nothing is downloaded.
        """
        with ThreadPoolExecutor() as threads:
            if not storage.is_local(self.path):
                return storage.fingerprint(sorted(map(str, threads.map(_checksum, self._files))))
            digests = threads.map(self._digest, sorted(self.tensors))
            return storage.fingerprint(list(digests))

    def _digest(self, name: str) -> list[Any]:
        info = self.tensors[name]
        data = self.read(name).reshape(-1).view(torch.uint8).numpy()
        return [name, str(info.dtype), list(info.shape), hashlib.sha256(data.data).hexdigest()]


def write_checkpoint(
    path: str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Checkpoint,
    max_shard_bytes: int = 4 << 30,
    extra: Mapping[str, str | bytes] | None = None,
) -> None:
    """Writes a model directory that appears whole or not at all; memory is bounded by one shard.

    Args:
        path: A local directory; replaced if it exists.
        tensors: Names and values, consumed one by one.
        like: The checkpoint whose configuration, tokenizer and other small files are copied.
        max_shard_bytes: A file is closed before it exceeds this.
        extra: Further small files, by their path below the directory (a model card, a task's head).

    Raises:
        StorageError: There is no right or no space to write.
    """
    with storage.new_dir(path) as directory:
        parts: list[tuple[Path, list[str]]] = []
        total = 0
        for shard in _shards(tensors, max_shard_bytes):
            part = directory / f"part-{len(parts)}"
            save_file(shard, part, metadata={"format": "pt"})
            total += sum(value.nbytes for value in shard.values())
            parts.append((part, list(shard)))
        if len(parts) == 1:
            parts[0][0].rename(directory / SINGLE)
        else:
            weight_map: dict[str, str] = {}
            for number, (part, names) in enumerate(parts, start=1):
                file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                part.rename(directory / file)
                weight_map.update(dict.fromkeys(names, file))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name in _companions(like):
            (directory / name).write_bytes(storage.read_bytes(storage.join(like.path, name)))
        for name, content in (extra or {}).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, grouped so that no group exceeds `max_bytes` unless one tensor does."""
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, value in tensors:
        if shard and filled + value.nbytes > max_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = value.contiguous()
        filled += value.nbytes
    yield shard


def _companions(checkpoint: Checkpoint) -> list[str]:
    """The small files that make a model directory loadable: configuration, tokenizer, preprocessor."""
    listed = storage.list_dir(checkpoint.path)
    return [name for name in listed if any(fnmatchcase(name, pattern) for pattern in COMPANIONS)]


def _weight_files(path: str, listed: list[str]) -> list[str]:
    """The safetensors files of a model directory.

    Raises:
        CheckpointError: There are none, or the index names a file outside the directory or one that is missing.
    """
    if SINGLE in listed:
        return [SINGLE]
    if INDEX not in listed:
        pickles = [name for name in listed if name.endswith(PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{path} holds its weights as a pickle ({pickles[0]}), which can run code when it is opened. Convert it "
                "where you trust it: AutoModel.from_pretrained(DIR).save_pretrained(NEW) writes safetensors"
            )
        raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}: the download is incomplete")
    try:
        weight_map: dict[str, str] = storage.read_json(storage.join(path, INDEX))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (StorageError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{storage.join(path, INDEX)} is not an index of safetensors files ({error})") from error
    for name in names:
        if "/" in name or "\\" in name or name in (".", ".."):
            raise CheckpointError(f"{storage.join(path, INDEX)} names a file outside its directory: '{name}'")
        if name not in listed:
            raise CheckpointError(f"{path} lacks {name}, which its index names: the download is incomplete")
    return names


def _checksum(path: str) -> tuple[str, str]:
    """A remote file's name with the checksum that its server keeps, or its size where it keeps none."""
    system, inner = storage.file_system(path)
    info = system.info(inner)
    known = info.get("ETag") or info.get("md5Hash") or info.get("checksum") or info["size"]
    return storage.base_name(path), str(known)
