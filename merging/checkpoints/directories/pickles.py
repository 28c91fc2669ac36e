"""Checkpoints that PyTorch wrote as pickles: their tensors, read without running what a pickle may hold."""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import INDEX, PICKLES, SINGLE, require_beside
from merging.checkpoints.formats.safetensors_header import DTYPES
from merging.errors import CheckpointError, StorageError
from merging.io import addresses, documents, storage

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER_PICKLE = "adapter_model.bin"
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs put the weights."""
OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".safetensors", ".index.json")
"""How files end that hold weights for other programs, or the state of a training run."""


@dataclass(frozen=True)
class Pickled:
    """The tensors of a pickled checkpoint.

    Args:
        tensors: By name; names of tied weights share memory.
        is_adapter: Whether it is an adapter's file.
    """

    tensors: Mapping[str, Tensor]
    is_adapter: bool


def read_pickled(path: str) -> Pickled:
    """Reads every tensor of a directory's pickles, with `weights_only=True`.

    Args:
        path: The directory, with `pytorch_model.bin`, its shards and their index, or `adapter_model.bin`.

    Raises:
        CheckpointError: There is no pickle of weights, it holds more than tensors, or a shard is missing or damaged.
    """
    listed = storage.list_dir(path)
    if SINGLE in listed or INDEX in listed:
        raise CheckpointError(f"{path} holds safetensors already ({SINGLE if SINGLE in listed else INDEX})")
    if PICKLE_INDEX in listed:
        return Pickled(_read_shards(path, listed), is_adapter=False)
    for name in (PICKLE, ADAPTER_PICKLE):
        if name in listed:
            return Pickled(read_tensors(addresses.join(path, name)), is_adapter=name == ADAPTER_PICKLE)
    raise CheckpointError(
        f"{path} holds none of {PICKLE}, {PICKLE_INDEX} and {ADAPTER_PICKLE}: there is nothing to convert"
    )


def _read_shards(path: str, listed: list[str]) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    place = addresses.join(path, PICKLE_INDEX)
    try:
        weight_map = documents.read_json(place)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (StorageError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{place} is not an index of weight files ({error})") from error
    tensors_read: dict[str, Tensor] = {}
    for file in files:
        require_beside(place, file, listed)
        tensors = read_tensors(addresses.join(path, file))
        if twice := tensors_read.keys() & tensors.keys():
            raise CheckpointError(f"{path}: '{min(twice)}' stands in two of its files")
        tensors_read |= tensors
    if missing := weight_map.keys() - tensors_read.keys():
        raise CheckpointError(f"{path} lacks '{min(missing)}', which its index names: copy it again")
    return tensors_read


def read_tensors(path: str) -> dict[str, Tensor]:
    """A pickle's tensors by name, read with `weights_only=True`.

    Raises:
        CheckpointError: It holds more than tensors, or is damaged.
    """
    try:
        value = _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which could run code when it is opened, and is not read: save its weights alone, "
            "where you trust it, with `model.save_pretrained(NEW)`"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no file that torch.save wrote, or is damaged ({error})") from error
    wrapped = [key for key in WRAPPERS if isinstance(value, Mapping) and isinstance(value.get(key), Mapping)]
    if wrapped:
        value = value[wrapped[0]]
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{path} holds no weights by name, but a {type(value).__name__}")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r} is no tensor, but a {type(tensor).__name__}")
        if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: '{name}' is {tensor.dtype}, {tensor.layout}, which is not converted")
    return {name: tensor.detach() for name, tensor in value.items()}


def _load(path: str) -> Any:
    """What `torch.save` wrote, by memory map where the file is local and of the format that can be mapped."""
    if not addresses.is_local(path):
        return torch.load(io.BytesIO(storage.read_bytes(path)), map_location="cpu", weights_only=True)
    place = addresses.local_path(path)
    try:
        return torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before 1.6 cannot be mapped
        return torch.load(place, map_location="cpu", weights_only=True)
