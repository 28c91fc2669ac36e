"""Which parameter of a model transformers loads a stored tensor into, by its own rules of renaming, joining and splitting."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Renamed:
    """A stored tensor's name, and what transformers makes of it.

    Args:
        name: In the checkpoint.
        target: In the model; of a tensor that is joined or split, the first name that comes of it.
        converter: Transformers' `WeightConverter` that joins or splits it; None where it only gets another name.
        pattern: Which of the converter's source patterns the name matches.
    """

    name: str
    target: str
    converter: Any = None
    pattern: str | None = None


def renamed(model: nn.Module, names: Iterable[str], known: Mapping[str, Any]) -> Iterator[Renamed]:
    """What transformers' `convert_and_load_state_dict_in_model` makes of names, in the order in which it loads them.

    Some of its rules depend on that order. A target that the model does not have is given as it is.

    Args:
        model: The model; its weights do not matter, and may lie on no device.
        names: The checkpoint's.
        known: The model's own names; no value is None.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms: Any = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, own = getattr(model, "base_model_prefix", "") or None, dict(known)
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], prefix, own)
        yield Renamed(name, target, converter_of[pattern] if pattern is not None else None, pattern)


def backbone_prefix(model: nn.Module) -> str:
    """What stands before a backbone's names in this model (`bert.`); empty where nothing does."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def joined(groups: Iterable[Iterable[str]]) -> list[set[str]]:
    """Groups of names of one weight, those that share a name as one."""
    unions: list[set[str]] = []
    for group in map(set, groups):
        touching = [other for other in unions if other & group]
        unions = [other for other in unions if other not in touching] + [group.union(*touching)]
    return unions
