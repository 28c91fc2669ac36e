"""A PEFT LoRA directory as a checkpoint: its tensors are formed from the base's, one by one, as they are read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from merging.checkpoints.adapters.lora import Adapted, adapted
from merging.checkpoints.checkpoint import CONFIG, Checkpoint, read_settings
from merging.checkpoints.formats.config_checks import check_config
from merging.checkpoints.formats.safetensors_file import SafetensorsFile
from merging.errors import CheckpointError, StorageError
from merging.io import addresses, hashing, hub, storage

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterCheckpoint(Checkpoint):
    """A LoRA adapter on its base, as the checkpoint that merging the two would give; nothing is written.

    Args:
        base: The base checkpoint.
        adapted: What the adapter makes of it.
    """

    base: Checkpoint
    adapted: Adapted

    @classmethod
    def on(cls, path: str, base: Checkpoint) -> "AdapterCheckpoint":
        """Opens an adapter's directory: reads configuration and header, no weights.

        Args:
            path: The directory, with `adapter_config.json` and `adapter_model.safetensors`; a `config.json` and
                a tokenizer beside them are used where they are there.
            base: The checkpoint that it was trained on.

        Raises:
            CheckpointError: It is damaged, no LoRA, of a kind that is more than θ_0 + scaling · B @ A, or was
                trained on another model.
        """
        listed = storage.list_dir(path)
        try:
            storage.require_files(path)
        except StorageError as error:
            raise CheckpointError(str(error)) from error
        settings = read_settings(addresses.join(path, ADAPTER_CONFIG))
        own = read_settings(addresses.join(path, CONFIG)) if CONFIG in listed else None
        if own is not None:
            # of the base that it was trained on; here it is added to plain weights
            own.pop("quantization_config", None)
        if ADAPTER_WEIGHTS not in listed:
            raise CheckpointError(
                f"{path} has no {ADAPTER_WEIGHTS}: the download is incomplete, or it is a pickle; "
                "`model.save_pretrained(DIR)` of peft writes safetensors"
            )
        file = SafetensorsFile.open(addresses.join(path, ADAPTER_WEIGHTS))
        if not file.tensors:
            raise CheckpointError(f"{file.path} holds no tensors: copy the adapter again")
        if own is not None:
            check_config(own, len(base.tensors) + len(file.tensors), addresses.join(path, CONFIG))
        adapter = adapted(path, settings, own, base, file)
        return cls(path, adapter.config, adapter.tensors, {file.path: file}, base, adapter)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU: the base's or the adapter's own, with scaling · B @ A added where the adapter has factors.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        whole = self.adapted.whole.get(name)
        value = self._file.read(whole) if whole is not None else self.base.read(self.adapted.origins[name])
        return self.adapted.low_rank[name].added(value, self._file) if name in self.adapted.low_rank else value

    @property
    def is_adapter(self) -> bool:
        """Yes."""
        return True

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """L [rows, r] and R [r, columns]: what is added to the base's tensor; r = 0 where nothing is.

        Returns:
            None where the adapter holds the tensor in full, or adds a product to what is no matrix.
        """
        shape = self.tensors[name].shape
        if name in self.adapted.whole:
            return None
        if name not in self.adapted.low_rank:
            rows = shape[0] if shape else 1
            return torch.empty(rows, 0), torch.empty(0, math.prod(shape[1:]))
        return self.adapted.low_rank[name].factors(self._file) if len(shape) == 2 else None

    def prefetch(self, names: Iterable[str]) -> None:
        """Says that these tensors are about to be read: what the adapter holds of them is sent for now, if it is remote."""
        whole, low_rank = self.adapted.whole, self.adapted.low_rank
        for name in names:
            if name in whole:
                self._file.prefetch([whole[name]])
            if name in low_rank:
                self._file.prefetch([low_rank[name].down, low_rank[name].up])

    @property
    def is_mapped(self) -> bool:
        """No: its tensors are formed when they are read."""
        return False

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """The base's, and what tells the adapter's own files from others."""
        settings = storage.checksum(addresses.join(self.path, ADAPTER_CONFIG))
        return (*self.base.identity, self.path, settings, storage.checksum(self._file.path))

    @property
    def hashes_tensors(self) -> bool:
        """No: what its tensors are formed from."""
        return False

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of base, adapter and scalings."""
        scalings = {name: low.scaling for name, low in sorted(self.adapted.low_rank.items())}
        return hashing.fingerprint([self.base.fingerprint, hashing.file_fingerprint(self._file.path), scalings])

    @property
    def _file(self) -> SafetensorsFile:
        return next(iter(self._files.values()))


def is_adapter(path: str) -> bool:
    """Whether a directory holds an adapter and no model."""
    listed = storage.list_dir(path)
    return ADAPTER_CONFIG in listed and not any(
        name.endswith((".safetensors", ".safetensors.index.json")) and not name.startswith("adapter_")
        for name in listed
    )


def model_and_adapter(path: str) -> tuple[str, str] | None:
    """The two directories of `MODEL+ADAPTER`; None where that is one directory's name, or holds no +."""
    model, _, adapter = path.partition("+")
    on_hub = hub.SCHEME in path  # where no name holds a +
    return (model, adapter) if model and adapter and (on_hub or not storage.is_dir(path)) else None


def open_checkpoint(path: str, base: str | Checkpoint | None = None) -> Checkpoint:
    """A model directory, or an adapter's with its base.

    Args:
        path: The directory; or `MODEL+ADAPTER`, an adapter on a model of its own.
        base: The adapter's base, where the path names none; by default what its `adapter_config.json` names, if that is a
            directory.

    Raises:
        CheckpointError: It is missing, damaged or unsafe, or an adapter whose base is not known.
    """
    if on_model := model_and_adapter(path):
        model, adapter = on_model
        own = base if isinstance(base, Checkpoint) and base.path == model else Checkpoint.open(model)
        return AdapterCheckpoint.on(adapter, own)
    if not is_adapter(path):
        return Checkpoint.open(path)
    if not base:
        base = str(read_settings(addresses.join(path, ADAPTER_CONFIG)).get("base_model_name_or_path") or "")
        if not base or not storage.is_dir(base):
            raise CheckpointError(
                f"{path} is an adapter of '{base}', which is no directory here: download it, and name the directory as "
                "the base"
            )
    return AdapterCheckpoint.on(path, base if isinstance(base, Checkpoint) else Checkpoint.open(base))
