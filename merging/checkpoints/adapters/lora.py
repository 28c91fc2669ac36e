"""What the tensors of a PEFT LoRA's file mean: which weights of its base it changes, and which it holds in full."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.adapters.lora_settings import REMEDY, of_module, refuse_unknown
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.formats import vocab_size
from merging.checkpoints.formats.safetensors_file import SafetensorsFile, TensorInfo
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.parameter_names import conv1d
from merging.checkpoints.models.renaming import backbone_prefix
from merging.checkpoints.tied_weights import are_equal
from merging.errors import CheckpointError

PREFIX = "base_model.model."
LOADERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's `task_type` → the class in `transformers` that an adapter was trained in."""


@dataclass(frozen=True)
class LowRankDelta:
    """What an adapter adds to one weight: scaling · B @ A.

    Args:
        down: Name of A [r, in] in the adapter's file; of a convolution [r, in, …].
        up: Name of B [out, r]; of a convolution [out, r, 1, …].
        scaling: alpha / r, or alpha / √r.
        transposed: The weight is stored [in, out]: `Conv1D`, embeddings.
    """

    down: str
    up: str
    scaling: float
    transposed: bool

    def factors(self, file: SafetensorsFile) -> tuple[Tensor, Tensor]:
        """L [rows, r] and R [r, columns], whose product is added to a matrix as it is stored; float32 or wider."""
        down, up = file.read(self.down), file.read(self.up)
        exact = torch.promote_types(down.dtype, torch.float32)
        left, right = up.to(exact).flatten(1) * self.scaling, down.to(exact).flatten(1)
        return (right.mT, left.mT) if self.transposed else (left, right)

    def added(self, weight: Tensor, file: SafetensorsFile) -> Tensor:
        """The member's weight, in the wider dtype of base and adapter: products and sum are rounded to it once."""
        down, up = file.read(self.down), file.read(self.up)
        stored = torch.promote_types(weight.dtype, down.dtype)
        exact = torch.promote_types(stored, torch.float32)
        delta = up.to(exact).flatten(1) @ down.to(exact).flatten(1)
        delta = delta.mT if self.transposed else delta
        return weight.to(exact).add(delta.reshape(weight.shape), alpha=self.scaling).to(stored)


@dataclass(frozen=True)
class Adapted:
    """A model that an adapter makes of its base.

    Args:
        config: Its configuration.
        tensors: Name to place, as the merged model would be saved; what is formed from two files lies in none.
        origins: Name → the base's name, for all that the base holds of it.
        whole: Name → name in the adapter's file, of tensors that it holds in full (`modules_to_save`, saved embeddings).
        low_rank: Name → what is added to that tensor, or to the base's.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    origins: Mapping[str, str]
    whole: Mapping[str, str]
    low_rank: Mapping[str, LowRankDelta]


def adapted(
    path: str, settings: Mapping[str, Any], own: dict[str, Any] | None, base: Checkpoint, file: SafetensorsFile
) -> Adapted:
    """Finds what the adapter of a directory changes; reads no weights.

    Args:
        path: The directory, for messages.
        settings: `adapter_config.json`.
        own: `config.json` beside it, if there is one.
        base: The checkpoint that it was trained on.
        file: The adapter's tensors.

    Raises:
        CheckpointError: It is no LoRA, more than θ_0 + scaling · B @ A, or was trained on another model.
    """
    refuse_unknown(path, settings)
    return _choose(path, settings, own, base, file).adapted()


def _choose(
    path: str, settings: Mapping[str, Any], own: dict[str, Any] | None, base: Checkpoint, file: SafetensorsFile
) -> "_AdapterNames":
    """The names in an adapter's file as those of the first class that knows them all."""
    config = {**base.config, **(own or {})}
    mapped = (settings.get("auto_mapping") or {}).get("base_model_class")
    loader = LOADERS.get(str(settings.get("task_type")))
    architecture = str(((own or {}).get("architectures") or [base.architecture])[0])
    candidates: list[tuple[str, str | None]] = [(loader or "", loader)] if loader else []
    candidates += [(str(name), None) for name in dict.fromkeys((mapped, architecture, base.architecture)) if name]
    errors = []
    for name, auto in candidates:
        try:
            model, complete = _skeleton(path, config, name, auto, file)
            return _AdapterNames(path, base, file, settings, model, complete)
        except CheckpointError as error:
            errors.append(error)
    raise errors[0]


def _skeleton(
    path: str, config: dict[str, Any], architecture: str, loader: str | None, file: SafetensorsFile
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that an adapter was trained in, without weights, and its configuration."""
    model = _build(path, config, architecture, loader)
    if classes := _outputs(model, file):
        config = config | {
            "id2label": {str(n): f"LABEL_{n}" for n in range(classes)},
            "label2id": {f"LABEL_{n}": n for n in range(classes)},
        }
        config.pop("num_labels", None)
        model = _build(path, config, architecture, loader)
    if rows := _rows(model, file):
        config = vocab_size.replaced(config, rows)
        model = _build(path, config, architecture, loader)
    return model, {**config, "architectures": [type(model).__name__]}


def _build(path: str, config: Mapping[str, Any], architecture: str, loader: str | None) -> nn.Module:
    try:
        return skeleton.build(path, config, architecture, loader)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: the model that this adapter belongs to. {REMEDY}") from error


def _outputs(model: nn.Module, file: SafetensorsFile) -> int:
    """Number of classes of the adapter's head, where it is another than the model's."""
    labels = getattr(model.config, "num_labels", 0)
    for name, parameter in model.named_parameters():
        there = file.tensors.get(PREFIX + name)
        if there and parameter.shape[:1] == (labels,) and there.shape[1:] == parameter.shape[1:]:
            return 0 if there.shape[0] == labels else there.shape[0]
    return 0


def _rows(model: nn.Module, file: SafetensorsFile) -> int:
    """Number of rows of the embeddings that the adapter holds in full, where it is another than the model's."""
    if (table := skeleton.token_table(model)) is None:
        return 0
    path = next((path for path, module in model.named_modules() if module is table), "")
    for name in (f"{path}.weight", f"{path}.base_layer.weight"):
        there = file.tensors.get(PREFIX + name)
        if there and len(there.shape) == 2 and there.shape[0] != table.weight.shape[0]:
            return there.shape[0]
    return 0


class _AdapterNames:
    """Finds what the names in an adapter's file mean.

    Args:
        path: The adapter's directory, for messages.
        base: The checkpoint that it was trained on.
        file: Its tensors.
        settings: `adapter_config.json`.
        model: The model that it was trained in, without weights.
        config: That model's configuration.

    Raises:
        CheckpointError: There are names that the model does not know.
    """

    def __init__(
        self,
        path: str,
        base: Checkpoint,
        file: SafetensorsFile,
        settings: Mapping[str, Any],
        model: nn.Module,
        config: Mapping[str, Any],
    ) -> None:
        self._path, self._base, self._file, self._settings = path, base, file, settings
        self._model, self._config = model, config
        self._saved = skeleton.saved_names(model)
        self._by_saved = {saved: live for live, saved in reversed(self._saved.items())}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._buffers = dict(model.named_buffers())
        self._stored: dict[str, list[str]] = {}
        for name, live in skeleton.live_names(model, base.tensors).items():
            self._stored.setdefault(live, []).append(name)
        self._tied = [names for names in skeleton.shared_names(model) if self._are_one(names)]
        self._whole: dict[str, str] = {}
        self._shared: dict[str, str] = {}
        self._parts: dict[str, dict[str, str]] = {}
        self._sort()

    def adapted(self) -> Adapted:
        """What the adapter makes of its base."""
        if self._settings.get("bias", "none") != "none" and not any(name.endswith(".bias") for name in self._whole):
            raise self._error(f"was trained with bias = {self._settings['bias']!r}, but holds no bias")
        groups, config = self._groups()
        tensors: dict[str, TensorInfo] = {}
        origins: dict[str, str] = {}
        whole: dict[str, str] = {}
        low_rank: dict[str, LowRankDelta] = {}
        for live, sharing in groups.items():
            stored = next((there for name in (live, *sharing) for there in self._stored.get(name, ())), None)
            saved = self._spelled(live)
            if live in self._parts:
                low_rank[saved] = self._low_rank(live, self._parts[live])
            if len(self._stored.get(live, ())) > 1 and (live in self._parts or live in self._whole):
                raise self._error(
                    f"trains '{live}', whose parts are weights of their own in {self._base.path}. {REMEDY}"
                )
            key = self._whole.get(live) or next((self._shared[n] for n in sharing if n in self._shared), None)
            if key is not None:
                whole[saved] = key
                there = self._file.tensors[key]
            elif stored is not None and len(self._stored.get(live, ())) < 2:
                origins[saved] = stored
                there = self._base.tensors[stored]
            elif live in self._parts:
                raise self._error(f"adapts '{saved}', which the base {self._base.path} lacks: name its own base")
            else:
                continue
            tensors[saved] = self._formed(saved, there, low_rank.get(saved))
        taken = set(origins.values())
        for live, names in self._stored.items():
            rest = [name for name in names if name not in taken and (len(names) > 1 or live not in self._saved)]
            for name in rest:  # weights that the model joins, which no adapter changes, and buffers
                if live in self._whole:
                    whole[name], there = self._whole[live], self._file.tensors[self._whole[live]]
                else:
                    origins[name], there = name, self._base.tensors[name]
                tensors[name] = self._formed(name, there, None)
        return Adapted(config, tensors, origins, whole, low_rank)

    def _groups(self) -> tuple[dict[str, tuple[str, ...]], Mapping[str, Any]]:
        """Name in the model of every tensor → all names that share its weight in the base; and the member's configuration."""
        tied = {name: names for names in self._tied for name in names}
        for name in (*self._parts, *self._whole):
            if name in tied and self._settings.get("ensure_weight_tying"):
                raise self._error(f"trains '{name}' with ensure_weight_tying, tied to '{tied[name][0]}'. {REMEDY}")
        trained = {*self._parts, *self._whole}
        parted = {names for names in self._tied if trained.intersection(names)}
        config = skeleton.untied(self._config) if parted else self._config
        if config != self._config:  # which unties others, too
            model = skeleton.build(self._path, config, type(self._model).__name__)
            still = set(skeleton.shared_names(model))
            parted |= {names for names in self._tied if names not in still}
        groups: dict[str, tuple[str, ...]] = {}
        for live in self._saved:
            sharing = tied.get(live, (live,))
            if (
                len(sharing) == 1
                or sharing in parted
                or live == next((name for name in sharing if name in self._stored), sharing[0])
            ):
                groups[live] = sharing
        return groups, config

    def _are_one(self, names: Sequence[str]) -> bool:
        """Whether the base has one weight under these names: transformers does not tie what is stored with different values."""
        stored = [self._stored[name][0] for name in names if name in self._stored]
        return all(are_equal(self._base, stored[0], other) for other in stored[1:])

    def _spelled(self, live: str) -> str:
        """What a tensor is called in the merged checkpoint: as the base has it, but for the backbone's prefix."""
        saved, stored = self._saved[live], self._stored.get(live, [])
        prefix = backbone_prefix(self._model)
        if len(stored) != 1 or stored[0] in (saved, saved.removeprefix(prefix)) or prefix + saved == stored[0]:
            return saved
        return stored[0]

    def _sort(self) -> None:
        """Sorts the file's names: modules of the adapter's own, weights that are the base's own, and factors."""
        for key in self._file.tensors:
            inner = key.removeprefix(PREFIX)
            # biases of what `modules_to_save` replaces: the model computes with the copy
            if ".original_module." in inner:
                continue
            if parts := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", inner):
                self._parts.setdefault(self._name(f"{parts[1]}.weight", key), {})[parts[2]] = key
                continue
            live = self._name(inner.replace(".base_layer.", ".").replace(".modules_to_save.", "."), key)
            is_copy = ".base_layer." not in inner and self._is_saved_module(live)
            (self._whole if is_copy or not self._is_tied(live) else self._shared)[live] = key
        if halves := [name for name, keys in self._parts.items() if len(keys) < 2]:
            raise self._error(f"holds only one of the two factors of '{halves[0]}': copy it again")

    def _is_saved_module(self, live: str) -> bool:
        """Whether a tensor belongs to one of `modules_to_save`, of which the adapter has a copy."""
        paths = [live.rpartition(".")[0]]
        while "." in paths[-1]:
            paths.append(paths[-1].rpartition(".")[0])
        return any(path.endswith(str(name)) for name in self._settings.get("modules_to_save") or () for path in paths)

    def _is_tied(self, live: str) -> bool:
        """Whether a tensor is tied to another: saved beside an adapter, and no copy, it is the base's for both."""
        return any(live in names for names in self._tied)

    def _name(self, name: str, key: str) -> str:
        """The name in the model, of a name in the model or, where an older transformers wrote it, in a checkpoint."""
        if name in self._saved:
            return name
        if name in self._by_saved:
            return self._by_saved[name]
        live = skeleton.live_names(self._model, [name]).get(name)
        if live in self._saved:
            return live
        if name in self._buffers:
            return name
        raise self._error(f"holds '{key}', of which {type(self._model).__name__} knows nothing. {REMEDY}")

    def _low_rank(self, live: str, keys: Mapping[str, str]) -> LowRankDelta:
        path = live.rpartition(".")[0]
        module = self._modules[path]
        down, up = self._file.tensors[keys["A"]].shape, self._file.tensors[keys["B"]].shape
        transposed = isinstance(module, conv1d() | nn.Embedding)
        shape = module.weight.shape if isinstance(module.weight, Tensor) else torch.Size()
        extents = (math.prod(down[1:]), up[0]) if transposed else (up[0], math.prod(down[1:]))
        known = isinstance(module, nn.Linear | conv1d() | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not known or getattr(module, "groups", 1) != 1:
            raise self._error(f"adapts '{path}', a {type(module).__name__}. {REMEDY}")
        if len(down) < 2 or len(up) < 2 or down[0] != up[1] or extents != (shape[0], shape[1:].numel()):
            raise self._error(
                f"has factors {list(up)} and {list(down)} for '{live}' {list(shape)}: it belongs to another base"
            )
        rank = down[0]
        declared = of_module(self._settings.get("rank_pattern"), path, self._settings.get("r", 8))
        if rank != declared:
            raise self._error(
                f"has rank {rank} for '{live}', its adapter_config.json says {declared:g}: copy both again"
            )
        alpha = of_module(self._settings.get("alpha_pattern"), path, self._settings.get("lora_alpha", 8))
        return LowRankDelta(
            keys["A"],
            keys["B"],
            alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank),
            transposed,
        )

    def _formed(self, name: str, there: TensorInfo, low: LowRankDelta | None) -> TensorInfo:
        """Where a tensor of the base or the adapter lies; one that is formed from it lies in no file."""
        if low is None:
            return replace(there, name=name)
        dtype = torch.promote_types(there.dtype, self._file.tensors[low.down].dtype)
        return TensorInfo(name, dtype, there.shape, "", 0, math.prod(there.shape) * dtype.itemsize)

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: the adapter {message}")
