"""What a live model's parameters are in the checkpoint: their names there, and how they are stored.

`transformers` takes seconds to import, and a merge of files needs none of it: it is imported where a live model is looked at.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.models.renaming import Renamed, backbone_prefix, joined, renamed

_REMEMBERED = "_names_in_checkpoint"


def remember_names(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Has `checkpoint_names` and `in_checkpoint` give the names of the very checkpoint that a model was loaded from.

    They may differ from those under which `save_pretrained` would write the model: official GPT-2 names have no prefix.

    Args:
        model: The model; copies of it remember too.
        shapes: The checkpoint's tensors.
    """
    plain = {c.target: c.sources[0] for c in loading(model, shapes).conversions if c.apply is None}
    ties = {
        name: plain[other] for name, others in tied_names(model).items() for other in sorted(others) if other in plain
    }
    setattr(model, _REMEMBERED, (ties | plain, frozenset(shapes)))


def checkpoint_names(model: nn.Module) -> dict[int, str]:
    """`id` of each parameter → its name in the checkpoint: the one it was loaded from, or as `save_pretrained` writes it.

    Of tied weights the first name counts, under which they are saved. Where transformers renames weights as
    it loads them (ViT), the renaming is reverted; where it joins several into one (experts), the model's own
    name is kept: `in_checkpoint` takes such a value apart.
    """
    names = dict(model.named_parameters())
    marks = {name: torch.empty_like(parameter, device="meta") for name, parameter in names.items()}
    saved = {id(mark): name for name, mark in in_checkpoint(model, marks).items()}
    return {id(parameter): saved.get(id(marks[name]), name) for name, parameter in names.items()}


def in_checkpoint(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a live model's parameters, entry for entry, under the names and in the shapes of its checkpoint.

    Args:
        model: The model, as `from_pretrained` gave it.
        values: By the model's own names, one value for each entry of the parameter: the weights, or their Fisher information.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return dict(values)
    nothing: tuple[dict[str, str], frozenset[str]] = {}, frozenset()
    plain, stored = getattr(model, _REMEMBERED, nothing)
    stored_values = {plain[name]: value for name, value in values.items() if name in plain}
    prefix = backbone_prefix(model)
    rest = {name: value for name, value in values.items() if name not in plain}
    for name, value in revert_weight_conversion(model, rest).items() if rest else ():
        spellings = (name, name.removeprefix(prefix), prefix + name)
        stored_values[next((spelling for spelling in spellings if spelling in stored), name)] = value
    return stored_values


@dataclass(frozen=True)
class Conversion:
    """Tensors of a checkpoint, and the parameters or buffers of a live model that transformers makes of them.

    Args:
        sources: Names in the checkpoint, in the order in which transformers joins them.
        target: Name in the model; of several, the first.
        apply: Tensors in the order of `sources` → the model's tensors by name; None where one tensor gets another name.
        kind: What two conversions have in common that do the same to tensors of the same shapes.
    """

    sources: tuple[str, ...]
    target: str
    apply: Callable[[Sequence[Tensor]], dict[str, Tensor]] | None = None
    kind: str = ""


@dataclass(frozen=True)
class Packing:
    """One stretch of memory that holds a conversion's sources and targets both, each as it stands.

    Args:
        size: Entries.
        sources: Where each source begins, in the order of the conversion.
        targets: Where each target begins, and its shape, in the order in which the conversion gives them.
    """

    size: int
    sources: tuple[int, ...]
    targets: tuple[tuple[int, torch.Size], ...]


@dataclass(frozen=True)
class Loading:
    """What transformers makes of a checkpoint that it loads into a model.

    Args:
        conversions: Which tensors become which parameters and buffers.
        missing: The model's names of weights that no tensor brings, which transformers initialises at random.
        homeless: The checkpoint's names of tensors that the model has no place for, which transformers drops, but for those
            that it says are of no account (masks and positions that older versions stored).
        misfits: The model's names of weights whose shape the tensors do not have → shape that they make, shape in the model.
    """

    conversions: Sequence[Conversion]
    missing: Sequence[str]
    homeless: Sequence[str]
    misfits: Mapping[str, tuple[Sequence[int], Sequence[int]]] = field(default_factory=dict)


def loading(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Loading:
    """How transformers loads a checkpoint into a model, by its own rules of renaming, joining and splitting.

    Args:
        model: The model; its weights do not matter, and may lie on no device.
        shapes: The checkpoint's tensors.
    """
    from transformers import PreTrainedModel

    live = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        same = [Conversion((name,), name) for name in shapes if name in live]
        return Loading(same, sorted(live.keys() - shapes), [name for name in shapes if name not in live])
    conversions, homeless = _by_transformers(model, live, shapes)
    made: dict[str, Sequence[int]] = {}
    for conversion in conversions:
        made |= targets_of(conversion, shapes)
    misfits = {
        name: (made[name], value.shape) for name, value in live.items() if made.get(name, value.shape) != value.shape
    }
    tied = {name for name, others in tied_names(model).items() if others & made.keys()}
    return Loading(conversions, *_of_account(model, live.keys() - made.keys() - tied, homeless), misfits)


def targets_of(conversion: Conversion, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Size]:
    """The model's names of what a conversion makes of tensors of these shapes, and its shapes."""
    if conversion.apply is None:
        return {conversion.target: torch.Size(shapes[conversion.sources[0]])}
    try:
        made = conversion.apply([torch.empty(*shapes[name], device="meta") for name in conversion.sources])
    except (RuntimeError, ValueError):  # the checkpoint holds some of the parts only
        return {}
    return {name: value.shape for name, value in made.items()}


def _of_account(model: Any, missing: Collection[str], homeless: Collection[str]) -> tuple[list[str], list[str]]:
    """Without the names that the model's class declares to be of no account."""
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(set(missing), set(homeless), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


def _by_transformers(model: Any, live: dict[str, Tensor], names: Iterable[str]) -> tuple[list[Conversion], list[str]]:
    """Conversions and homeless names, as transformers finds them: of two tensors with one place, the first has it."""
    groups: dict[str, list[Renamed]] = {}
    homeless = []
    for one in renamed(model, names, live):
        if one.target not in live or (one.converter is None and one.target in groups):
            homeless.append(one.name)
        else:
            groups.setdefault(one.target, []).append(one)
    conversions = []
    for target, group in groups.items():
        sources = tuple(one.name for one in group)
        if (converter := group[0].converter) is None:
            conversions.append(Conversion(sources[:1], target))
            homeless += sources[1:]
        else:
            patterns = tuple(str(one.pattern) for one in group)
            kind = repr((converter, converter.operations, patterns))
            conversions.append(Conversion(sources, target, _applied(model, converter, target, sources, patterns), kind))
    return conversions, homeless


def _applied(
    model: Any, converter: Any, target: str, sources: Sequence[str], patterns: Sequence[str]
) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    def apply(values: Sequence[Tensor]) -> dict[str, Tensor]:
        fresh = deepcopy(converter)
        for source, pattern, value in zip(sources, patterns, values, strict=True):
            fresh.add_tensor(target, source, pattern, value)
        made = fresh.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return apply


def packing(conversion: Conversion, shapes: Sequence[Sequence[int]]) -> Packing | None:
    """Memory in which a conversion's sources are parts of its targets, or the other way round, so that neither is copied.

    It is found by converting numbered entries. There is none where entries change their order within a source.

    Args:
        conversion: One that joins or splits.
        shapes: The sources' shapes.
    """
    assert conversion.apply is not None
    sizes = [torch.Size(shape).numel() for shape in shapes]
    total = sum(sizes)
    width = torch.int32 if total < 2**31 else torch.int64
    first = dict(zip(accumulate(sizes, initial=0), range(len(sizes)), strict=False))
    numbered = torch.split(torch.arange(total, dtype=width), sizes)
    made = conversion.apply([part.view(*shape) for part, shape in zip(numbered, shapes, strict=True)])
    del numbered
    flat = (
        next(iter(made.values())).reshape(-1) if len(made) == 1 else torch.cat([v.reshape(-1) for v in made.values()])
    )
    if len(flat) != total or flat.dtype != width or 0 in sizes:
        return None
    starts = [-1] * len(sizes)
    place = 0
    while place < total:  # what follows must be a whole source
        number = int(flat[place])
        source = first.get(number, -1)
        if source < 0 or starts[source] >= 0:
            return None
        stop = place + sizes[source]
        if not torch.equal(flat[place:stop], torch.arange(number, number + stop - place, dtype=width)):
            return None
        starts[source], place = place, stop
    targets, end = [], 0
    for value in made.values():
        targets.append((end, value.shape))
        end += value.numel()
    return Packing(total, tuple(starts), tuple(targets))


def tied_names(model: nn.Module) -> dict[str, set[str]]:
    """A model's names of weights that its configuration ties → the names that these are tied to."""
    return {name: group - {name} for group in joined(tie_sources(model).items()) for name in group}


def tie_sources(model: nn.Module) -> dict[str, str]:
    """A model's names of weights that its configuration ties → the name whose weight each has, if that is there."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def saved_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names in the checkpoint of one parameter: several where transformers joins weights (experts)."""
    return tuple(in_checkpoint(model, {name: torch.empty_like(model.get_parameter(name), device="meta")}))


def conv1d() -> type[nn.Module]:
    """GPT-2's linear layer, whose weight is stored [in, out]."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind
