"""What the tensors of a PEFT LoRA's file mean: which weights of its base it changes, and which it holds in full."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.checkpoint import Checkpoint, SafetensorsFile, TensorInfo
from merging.checkpoints.parameter_names import checkpoint_names, conv1d
from merging.checkpoints.patterns import matches
from merging.errors import CheckpointError

PREFIX = "base_model.model."
_IMPORTING = Lock()
"""Transformers replaces its module while it is imported: a thread that waits for another's import gets the replaced one."""
LOADERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's `task_type` → the class in `transformers` that an adapter was trained in."""
NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings under which a member's weights are not θ_0 + scaling · B @ A."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base's weights."""
REMEDY = "Merge it into its base with peft (`model.merge_and_unload().save_pretrained(DIR)`), and name that directory"


@dataclass(frozen=True)
class LowRank:
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
        whole: Name → name in the adapter's file, of tensors that it holds in full (`modules_to_save`).
        low_rank: Name → what is added to the base's tensor.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    origins: Mapping[str, str]
    whole: Mapping[str, str]
    low_rank: Mapping[str, LowRank]


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
    _refuse_unknown(path, settings)
    model, config = _skeleton(path, settings, own, base, file)
    return _Names(path, base, file, settings, model).adapted(config)


def _refuse_unknown(path: str, settings: Mapping[str, Any]) -> None:
    """All that cannot be read as θ_0 + scaling · B @ A."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} is a {kind} adapter, and only LoRA is read as a member. {REMEDY}")
    if found := [key for key in NOT_PLAIN if settings.get(key)]:
        raise CheckpointError(f"{path} is a LoRA with {found[0]} = {settings[found[0]]!r}. {REMEDY}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_BASE):
        raise CheckpointError(f"{path} was initialised by '{start}', which changes the base's weights too. {REMEDY}")


def _skeleton(
    path: str, settings: Mapping[str, Any], own: dict[str, Any] | None, base: Checkpoint, file: SafetensorsFile
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the adapter was trained in, without weights, and its configuration."""
    config = {**base.config, **(own or {})}
    mapped = (settings.get("auto_mapping") or {}).get("base_model_class")
    architecture = mapped or ((own or {}).get("architectures") or [base.architecture])[0]
    loader = LOADERS.get(str(settings.get("task_type")))
    model = _build(path, config, loader, architecture)
    classes = _outputs(model, file)
    if classes:
        config |= {
            "id2label": {str(n): f"LABEL_{n}" for n in range(classes)},
            "label2id": {f"LABEL_{n}": n for n in range(classes)},
        }
        config.pop("num_labels", None)
        model = _build(path, config, loader, architecture)
    return model, {**config, "architectures": [type(model).__name__]}


def _build(path: str, config: Mapping[str, Any], loader: str | None, architecture: str) -> nn.Module:
    """A model of a configuration on no device."""
    with _IMPORTING:
        import transformers

    try:
        parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        with torch.device("meta"):
            model: nn.Module = (
                getattr(transformers, loader).from_config(parsed)
                if loader
                else getattr(transformers, architecture)(parsed)
            )
    except Exception as error:  # transformers raises all kinds
        raise CheckpointError(
            f"{path}: transformers cannot build the {loader or architecture} that this adapter belongs to "
            f"({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    return model


def _outputs(model: nn.Module, file: SafetensorsFile) -> int:
    """Number of classes of the adapter's head, where it is another than the model's."""
    labels = getattr(model.config, "num_labels", 0)
    for name, parameter in model.named_parameters():
        there = file.tensors.get(PREFIX + name)
        if there and parameter.shape[:1] == (labels,) and there.shape[1:] == parameter.shape[1:]:
            return 0 if there.shape[0] == labels else there.shape[0]
    return 0


class _Names:
    """Finds what the names in an adapter's file mean."""

    def __init__(
        self, path: str, base: Checkpoint, file: SafetensorsFile, settings: Mapping[str, Any], model: nn.Module
    ) -> None:
        self._path, self._base, self._file, self._settings, self._model = path, base, file, settings, model
        names = checkpoint_names(model)
        self._saved = {live: names[id(value)] for live, value in model.named_parameters(remove_duplicate=False)}
        self._modules = dict(model.named_modules())
        self._live = {saved: live for live, saved in reversed(self._saved.items())}

    def adapted(self, config: Mapping[str, Any]) -> Adapted:
        """What the adapter makes of its base."""
        origins = {saved: there for saved in self._live if (there := self._origin(saved)) is not None}
        whole, parts = self._sorted()
        if self._settings.get("bias", "none") != "none" and not any(name.endswith(".bias") for name in whole):
            raise self._error(f"was trained with bias = {self._settings['bias']!r}, but holds no bias")
        low_rank = {}
        for target, keys in parts.items():
            low_rank[target] = self._low_rank(target, keys)
            if target not in origins:
                raise self._error(f"adapts '{target}', which the base {self._base.path} lacks: name its own base")
        tensors = {}
        for saved in self._live:
            if saved in whole:
                tensors[saved] = replace(self._file.tensors[whole[saved]], name=saved)
            elif saved in origins:
                tensors[saved] = self._formed(saved, self._base.tensors[origins[saved]], low_rank.get(saved))
        return Adapted(config, tensors, origins, whole, low_rank)

    def _origin(self, saved: str) -> str | None:
        """The base's name: the same, or without or with the backbone's prefix."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        return next((n for n in (saved, saved.removeprefix(prefix), prefix + saved) if n in self._base.tensors), None)

    def _sorted(self) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Name → key of tensors held in full; name of a weight → `A` and `B` → key."""
        whole: dict[str, str] = {}
        parts: dict[str, dict[str, str]] = {}
        for key in self._file.tensors:
            inner = key.removeprefix(PREFIX)
            if found := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", inner):
                parts.setdefault(self._name(f"{found[1]}.weight", key), {})[found[2]] = key
            else:
                whole[self._name(inner.replace(".base_layer.", ".").replace(".modules_to_save.", "."), key)] = key
        if halves := [name for name, keys in parts.items() if len(keys) < 2]:
            raise self._error(f"holds only one of the two factors of '{halves[0]}': copy it again")
        return whole, parts

    def _name(self, name: str, key: str) -> str:
        """The name in a saved checkpoint, of a name in the model or, where an older transformers wrote it, as it is."""
        if name in self._saved:
            return self._saved[name]
        if name in self._live:
            return name
        raise self._error(f"holds '{key}', of which {type(self._model).__name__} knows nothing. {REMEDY}")

    def _low_rank(self, target: str, keys: Mapping[str, str]) -> LowRank:
        path = self._live[target].rpartition(".")[0]
        module = self._modules[path]
        down, up = self._file.tensors[keys["A"]].shape, self._file.tensors[keys["B"]].shape
        transposed = isinstance(module, conv1d() | nn.Embedding)
        shape = module.weight.shape if isinstance(module.weight, Tensor) else torch.Size()
        extents = (math.prod(down[1:]), up[0]) if transposed else (up[0], math.prod(down[1:]))
        known = isinstance(module, nn.Linear | conv1d() | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not known or getattr(module, "groups", 1) != 1:
            raise self._error(f"adapts '{path}', a {type(module).__name__}. {REMEDY}")
        if down[0] != up[1] or extents != (shape[0], shape[1:].numel()):
            raise self._error(
                f"has factors {list(up)} and {list(down)} for '{target}' {list(shape)}: it belongs to another base"
            )
        alpha = _pattern(self._settings.get("alpha_pattern"), path, self._settings.get("lora_alpha", 8))
        rank = down[0]
        return LowRank(
            keys["A"],
            keys["B"],
            alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank),
            transposed,
        )

    def _formed(self, name: str, there: TensorInfo, low: LowRank | None) -> TensorInfo:
        """Where a tensor of the base lies; one that is formed from it lies in no file."""
        if low is None:
            return replace(there, name=name)
        dtype = torch.promote_types(there.dtype, self._file.tensors[low.down].dtype)
        return TensorInfo(name, dtype, there.shape, "", 0, math.prod(there.shape) * dtype.itemsize)

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: the adapter {message}")


def _pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """A module's entry in `alpha_pattern`, whose keys are regular expressions of the ends of paths."""
    for key, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({key})$", path):
            return float(value)
    return float(default)
