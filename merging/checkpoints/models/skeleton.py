"""Models without weights: what transformers makes of a configuration, and which of its parameters a stored name is.

`transformers` takes seconds to import, and most merges of files need none of it: it is imported where a model is built.
"""

from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.models.renaming import renamed
from merging.errors import CheckpointError

_IMPORTING = Lock()
"""Transformers replaces its module while it is imported: a thread that waits for another's import gets the replaced one."""


def parsed(config: Mapping[str, Any]) -> Any:
    """A `config.json` as the configuration class of its `model_type`; what transformers says of it is raised as it is."""
    with _IMPORTING:
        import transformers

    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(_with_floats(config))


def _with_floats(value: Any) -> Any:
    """A configuration's value with infinities as numbers, where transformers wrote `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(below) for key, below in value.items()}
    return [_with_floats(below) for below in value] if isinstance(value, list) else value


def build(path: str, config: Mapping[str, Any], architecture: str, loader: str | None = None) -> nn.Module:
    """A model on no device.

    Args:
        path: The checkpoint, for messages.
        config: Its `config.json`.
        architecture: Name of the class in `transformers`.
        loader: An `Auto…` class that knows which class it is, in place of `architecture`.

    Raises:
        CheckpointError: Transformers cannot build it.
    """
    with _IMPORTING:
        import transformers

    try:
        kind = getattr(transformers, loader or architecture)
        built = parsed(config)
        with torch.device("meta"):
            model: nn.Module = kind.from_config(built) if loader else kind(built)
            model.tie_weights()  # type: ignore[operator]
    except Exception as error:  # transformers raises all kinds
        raise CheckpointError(
            f"{path}: transformers cannot build its {loader or architecture} ({type(error).__name__}: {error})"
        ) from error
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers, under each of their names."""
    by_name: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return by_name | dict(model.named_buffers(remove_duplicate=False))


def live_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint → name in the model that transformers loads it into, of all that the model knows.

    Where transformers joins several weights into one (experts), all of them have its name.
    """
    names, known = list(names), tensors(model)
    targets = {one.name: one.target for one in renamed(model, names, known) if one.target in known}
    return {name: targets[name] for name in names if name in targets}


def saved_names(model: nn.Module) -> dict[str, str]:
    """Name in the model → name under which `save_pretrained` writes it, tied or not; one that is joined keeps its own."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = {
        name: torch.empty_like(value, device="meta") for name, value in model.named_parameters(remove_duplicate=False)
    }
    saved = {id(mark): name for name, mark in revert_weight_conversion(model, dict(marks)).items()}
    return {name: saved.get(id(mark), name) for name, mark in marks.items()}


def shared_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Names in the model of the parameters that several modules share, each set in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def token_table(model: nn.Module) -> nn.Embedding | None:
    """The table that a model looks tokens up in; None where it has none, has several, or transformers does not say which.

    Those are what `get_input_embeddings` raises `NotImplementedError` for (of images, of characters by hash, of several
    modalities), or answers with another kind of module.
    """
    ask: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = ask() if ask is not None else None
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose embeddings are not tied, where that changes nothing else.

    Where it would (T5 scales what goes into a tied head), it stays as it is: transformers does not tie weights that a
    checkpoint holds under both names with different values.
    """
    changed = {
        key: {**value, "tie_word_embeddings": False}
        if isinstance(value, Mapping) and "tie_word_embeddings" in value
        else value
        for key, value in config.items()
    } | {"tie_word_embeddings": False}
    before, after = (_plain(parsed(value).to_dict()) for value in (config, changed))
    return changed if before == after else dict(config)


def _plain(value: Any) -> Any:
    """A configuration without what says whether embeddings are tied."""
    if not isinstance(value, Mapping):
        return value
    return {key: _plain(inner) for key, inner in value.items() if key != "tie_word_embeddings"}
