"""A Hugging Face model directory: its configuration and its tensors, read one by one from safetensors files."""

import hashlib
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.formats.config_checks import check_config
from merging.checkpoints.formats.configuration import function_of
from merging.checkpoints.formats.quantised import refuse_quantised
from merging.checkpoints.formats.safetensors_file import SafetensorsFile, TensorInfo
from merging.checkpoints.formats.wrapped import refuse_wrapped
from merging.errors import CheckpointError, StorageError
from merging.io import addresses, documents, fact_cache, hashing, storage

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


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
            CheckpointError: It is missing, incomplete, damaged, quantised, an adapter, in PEFT's wrapper, a pickle, or names a
                file outside itself.
        """
        try:
            there = storage.is_dir(path)
        except StorageError as error:
            raise CheckpointError(str(error)) from error
        if not there:
            raise CheckpointError(
                f"there is no checkpoint directory at {path}. Models are read from Hugging Face directories "
                "(config.json + safetensors); `hf download NAME --local-dir DIR` makes one"
            )
        listed = storage.list_dir(path)
        if CONFIG not in listed:
            adapter = " It is an adapter, which can be a member, not a base" if "adapter_config.json" in listed else ""
            raise CheckpointError(f"{path} has no config.json, so it is not a Hugging Face model directory.{adapter}")
        try:
            storage.require_files(path)
        except StorageError as error:
            raise CheckpointError(str(error)) from error
        config = read_settings(addresses.join(path, CONFIG))
        files = [SafetensorsFile.open(addresses.join(path, name)) for name in _weight_files(path, listed)]
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            if twice := tensors.keys() & file.tensors.keys():
                raise CheckpointError(f"{path}: '{min(twice)}' stands in two of its files")
            tensors.update(file.tensors)
        check_config(config, len(tensors), addresses.join(path, CONFIG))
        refuse_wrapped(path, tensors)
        refuse_quantised(path, config, ((info.name, info.dtype, info.shape) for info in tensors.values()))
        return cls(path, config, tensors, {file.path: file for file in files})

    @property
    def architecture(self) -> str:
        """The configuration's first architecture, or its model type."""
        return str((self.config.get("architectures") or [self.config.get("model_type", "unknown")])[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def outside_layers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The last two components of the name, and the shape, of every tensor in no numbered layer: embeddings, heads."""
        for name, info in self.tensors.items():
            parts = name.split(".")
            if not any(part.isdigit() for part in parts):
                yield ".".join(parts[-2:]), info.shape

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in its stored dtype.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        return self._files[self.tensors[name].file].read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Says that these tensors are about to be read, best in this order; of remote files, they are sent for now."""
        for file, group in groupby(names, lambda name: self.tensors[name].file):
            self._files[file].prefetch(group)

    @property
    def is_adapter(self) -> bool:
        """Whether its tensors are formed from a base's and an adapter's."""
        return False

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """What an adapter adds to the base's tensor, as two factors; None where it holds the tensor itself."""
        return None

    def copy_here(self) -> None:
        """Copies what is remote to this machine, once for all its processes, if there is room; then `read` maps it."""
        for file in self._files.values():
            file.copy_here()

    def find_copy(self) -> None:
        """Looks once more for copies of what is remote: other processes may have made them since it was opened."""
        for file in self._files.values():
            file.find_copy()

    @property
    def is_mapped(self) -> bool:
        """Whether `read` gives views of memory maps: reading a part of a tensor costs no more than the part."""
        return addresses.is_local(self.path)

    @property
    def is_cached(self) -> bool:
        """Whether the system seems to hold all of it in memory already."""
        return self.is_mapped and all(file.is_cached for file in self._files.values())

    def advise(self, name: str, advice: int, start: int = 0, stop: int | None = None) -> None:
        """Tells the system about the use of bytes of a tensor, where there is a memory map: see `SafetensorsFile`."""
        if self.is_mapped:
            self._files[self.tensors[name].file].advise(name, advice, start, stop)

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """Where it lies, and what tells its files from others; with an empty string where nothing does for now."""
        return (self.path, *map(storage.checksum, self._files))

    @property
    def hashes_tensors(self) -> bool:
        """Whether the fingerprint is of the tensors that `read` gives."""
        return True

    @property
    def is_recognised(self) -> bool:
        """Whether the fingerprint is known without reading anything."""
        return "fingerprint" in self.__dict__ or fact_cache.recalled(self.identity) is not None

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of names, dtypes, shapes and bytes, whatever files they are cut into, and wherever they lie.

        All bytes are read for it, once as long as the files' checksums, or sizes and times, stay what they were: this
        process remembers, and of a remote checkpoint this user's cache directory.
        """
        return fact_cache.remembered(self.identity, self._content_hash, lasting=self._is_remote)

    @property
    def config_fingerprint(self) -> str:
        """Hash of what of its `config.json` may change the function that it computes."""
        return hashing.fingerprint(function_of(self.config))

    def recognise(self, fingerprint: str) -> None:
        """Takes over what somebody found who read all bytes."""
        self.__dict__["fingerprint"] = fingerprint
        fact_cache.keep(self.identity, fingerprint, lasting=self._is_remote)

    @property
    def _is_remote(self) -> bool:
        return not addresses.is_local(self.path)

    def _content_hash(self) -> str:
        names = sorted(self.tensors, key=lambda name: (self.tensors[name].file, self.tensors[name].start))
        self.prefetch(names)
        digest = Digest(self)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda name: digest.add(name, self.read(name)), names))
        return digest.fingerprint()


class Digest:
    """A checkpoint's fingerprint in the making, from tensors in any order and any thread.

    Args:
        checkpoint: Whose.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._entries: dict[str, list[Any]] = {}

    @property
    def names(self) -> Collection[str]:
        """What was added."""
        return self._entries.keys()

    def add(self, name: str, value: Tensor) -> None:
        """Takes a tensor as it is stored."""
        info = self.checkpoint.tensors[name]
        data = value.reshape(-1).view(torch.uint8).numpy()
        self._entries[name] = [name, str(info.dtype), list(info.shape), hashlib.sha256(data.data).hexdigest()]

    def fingerprint(self) -> str:
        """The fingerprint, once all tensors were added."""
        return hashing.fingerprint(sorted(self._entries.values()))


def read_settings(path: str) -> dict[str, Any]:
    """A checkpoint's `config.json`, or an adapter's.

    Raises:
        CheckpointError: It is missing, or no JSON object.
    """
    try:
        return documents.read_object(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error


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
                f"{path} holds its weights as a pickle ({pickles[0]}), and only safetensors are read. "
                f"`mergequest convert {path} --out NEW` writes them, every tensor, without running what is in a pickle"
            )
        raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}: the download is incomplete")
    index = addresses.join(path, INDEX)
    weight_map = read_settings(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is not an index of safetensors files: `weight_map` is not file names by tensor")
    if not weight_map:
        raise CheckpointError(f"{index} names no file: copy it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        require_beside(index, name, listed)
    return names


def require_beside(index: str, name: object, listed: Collection[str]) -> None:
    """Looks whether a file that an index names lies in the index's own directory.

    Args:
        index: The index's path or address.
        name: What it gives as a file's name.
        listed: What lies in the directory.

    Raises:
        CheckpointError: It is a place elsewhere, or there is no such file.
    """
    if not isinstance(name, str) or "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{index} names a file outside its directory: {repr(name)[:200]}")
    if name not in listed:
        raise CheckpointError(
            f"{posixpath.dirname(index)} lacks {name}, which its index names: the download is incomplete"
        )
