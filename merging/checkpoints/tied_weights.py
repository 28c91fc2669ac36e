"""Weights with two names: tied embeddings are one weight where all checkpoints tie them, and two where any does not."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.renaming import backbone_prefix, joined
from merging.checkpoints.view import View
from merging.errors import CheckpointError
from merging.io import addresses, fact_cache

UNTIED = ("token_type_embeddings.weight", "position_embeddings.weight")
"""Ends of names that no model of transformers ties, whatever else has their shape (a head of two classes)."""


def settle_ties(
    base: Checkpoint, members: Mapping[str, Checkpoint], notes: list[str]
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Base and members that agree on which names are one weight.

    A weight that every checkpoint ties, by its configuration and with equal tensors where it is stored twice, is seen under
    one name. One that any of them has apart is seen under both names in all of them, and the base's configuration says so.

    Args:
        base: The base.
        members: The members, by name.
        notes: What a user should know is added.

    Returns:
        The base and the members, as they are or as views.
    """
    everyone = {"": base, **members}
    if not _may_share(everyone):
        return base, dict(members)
    by_owner = {who: _names(checkpoint) for who, checkpoint in everyone.items()}
    names: dict[str, dict[str, str]] = {who: {key: key for key in c.tensors} for who, c in everyone.items()}
    parted: list[str] = []
    groups = [_classes(group, by_owner) for group in _joined([own.shared for own in by_owner.values()])]
    config = base.config
    if by_owner[""].shared and any(len(classes) > 1 for classes in groups):
        config = skeleton.untied(base.config)
        if config != base.config:
            groups = _untied_too(groups, by_owner, _names(replace(base, config=config)))
    for classes in groups:
        for same, stored in classes:
            kept = next((n for who, rep in stored.items() for n in same if by_owner[who].stored.get(n) == rep), same[0])
            for who, own in by_owner.items():
                for name in same:
                    names[who].pop(own.spelled(name), None)
                if who in stored:
                    names[who][own.spelled(kept)] = stored[who]
        if len(classes) > 1:
            parted += sorted(f"'{by_owner[''].spelled(same[0])}'" for same, _ in classes)
    if parted:
        notes.append(
            f"{' and '.join(parted)} are apart in some of base and members: the merge has both, and does not tie them"
        )
    return (
        _seen(base, names[""], config),
        {
            who: _seen(c, names[who], skeleton.untied(c.config) if parted and by_owner[who].shared else c.config)
            for who, c in members.items()
        },
    )


@dataclass(frozen=True)
class _TiedNames:
    """What a checkpoint's own model makes of its tensors; names are the model's, without the backbone's prefix.

    Args:
        stored: Name → the tensor that is stored under it, if any.
        saved: Name → what the tensor is called in the checkpoint, or would be.
        shared: Name → the stored tensor that it has, of all names that the model ties.
    """

    stored: Mapping[str, str]
    saved: Mapping[str, str]
    shared: Mapping[str, str]

    def spelled(self, name: str) -> str:
        """What a tensor is called in the checkpoint, or would be."""
        return self.stored.get(name, self.saved.get(name, name))


_Classes = list[tuple[list[str], dict[str, str]]]
"""Names that are one weight, and the stored tensor of each checkpoint that has it, for every weight of a group."""


def _holders(name: str, by_owner: Mapping[str, _TiedNames]) -> dict[str, str]:
    """The stored tensor under a name, of every checkpoint that has one."""
    return {
        who: own.shared.get(name, own.stored.get(name, ""))
        for who, own in by_owner.items()
        if name in own.shared or name in own.stored
    }


def _classes(group: Sequence[str], by_owner: Mapping[str, _TiedNames]) -> _Classes:
    """Names that are one weight in every checkpoint that has them, with the stored tensor of each that has it."""
    classes: _Classes = []
    for name in group:
        held = _holders(name, by_owner)
        for same, stored in classes:
            if all(stored.get(who, rep) == rep for who, rep in held.items()):
                same.append(name)
                stored |= held
                break
        else:
            classes.append(([name], held))
    return classes


def _untied_too(groups: Sequence[_Classes], by_owner: Mapping[str, _TiedNames], untied: _TiedNames) -> list[_Classes]:
    """Groups of names, where those are apart that a configuration without ties does not tie any more (BERT's output bias)."""
    parted: list[_Classes] = []
    for classes in groups:
        parted.append([])
        for same, stored in classes:
            if len({untied.shared.get(name, name) for name in same}) == 1:
                parted[-1].append((same, stored))
            else:
                parted[-1] += [([name], _holders(name, by_owner)) for name in same]
    return parted


def _seen(checkpoint: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint, or a view of it where it is to be seen otherwise."""
    if config == checkpoint.config and names == {key: key for key in checkpoint.tensors}:
        return checkpoint
    order = {key: number for number, key in enumerate(checkpoint.tensors)}
    return View.of(checkpoint, dict(sorted(names.items(), key=lambda pair: order[pair[1]])), config)


def _may_share(checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether any checkpoint may tie weights that another has apart or twice, by configurations and shapes alone.

    Where none stores two matrices outside of layers in one shape, all have the tied one once, and nothing is to be settled.
    """
    said = [list(_said(checkpoint.config)) for checkpoint in checkpoints.values()]
    if all(values and not any(values) for values in said):
        return False
    shapes: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for checkpoint in checkpoints.values():
        for end, shape in checkpoint.outside_layers():
            if len(shape) == 2 and end not in UNTIED:
                shapes[shape].add(end)
    return any(len(endings) > 1 for endings in shapes.values())


def _said(config: Mapping[str, Any]) -> Iterator[bool]:
    """What a configuration, and those within it, say of ties."""
    for key, value in config.items():
        if key == "tie_word_embeddings":
            yield bool(value)
        elif isinstance(value, Mapping):
            yield from _said(value)


def _names(checkpoint: Checkpoint) -> _TiedNames:
    """What a checkpoint's own model makes of its tensors; of one that transformers does not know, nothing is tied.

    As transformers loads it: a name that is not stored has the tensor of one that is, and names that are stored with
    different values are not tied.
    """
    try:
        model = skeleton.build(checkpoint.path, checkpoint.config, checkpoint.architecture)
    except CheckpointError:
        return _TiedNames({key: key for key in checkpoint.tensors}, {}, {})
    prefix = backbone_prefix(model)
    stored: dict[str, str] = {}
    for key, live in skeleton.live_names(model, checkpoint.tensors).items():
        stored.setdefault(live.removeprefix(prefix), key)
    saved = {live.removeprefix(prefix): key for live, key in skeleton.saved_names(model).items()}
    shared: dict[str, str] = {}
    for group in skeleton.shared_names(model):
        names = [live.removeprefix(prefix) for live in group]
        there = [stored[name] for name in names if name in stored]
        for name in names if there else ():
            own = stored.get(name, there[0])
            shared[name] = there[0] if are_equal(checkpoint, there[0], own) else own
    return _TiedNames(stored, saved, shared)


def are_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two stored tensors hold the same numbers; looked at once as long as the files stay the same."""
    if first == second:
        return True
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False

    def look() -> str:
        return str(torch.equal(checkpoint.read(first), checkpoint.read(second)))

    lasting = not addresses.is_local(checkpoint.path)
    return fact_cache.remembered((*checkpoint.identity, "equal", first, second), look, lasting=lasting) == str(True)


def _joined(shared: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Names that any checkpoint ties to each other, group by group, each name in one group."""
    groups: list[set[str]] = []
    for stored_of in shared:
        own: dict[str, set[str]] = defaultdict(set)
        for name, stored in stored_of.items():
            own[stored].add(name)
        groups += own.values()
    order = [name for stored_of in shared for name in stored_of]
    return [sorted(group, key=order.index) for group in joined(groups)]
