"""Weights with two names: tied embeddings are one weight where all checkpoints tie them, and two where any does not."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from merging.checkpoints import skeleton
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.view import View
from merging.errors import CheckpointError
from merging.io import fact_cache, storage


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
    shared = {who: _shared(checkpoint) for who, checkpoint in everyone.items()}
    names: dict[str, dict[str, str]] = {who: {key: key for key in c.tensors} for who, c in everyone.items()}
    parted: list[str] = []
    for group in _joined(shared):
        classes = _classes(group, everyone, shared)
        for same, stored in classes:
            kept = next((name for name in stored.values() if name in same), same[0])
            for who in everyone:
                for name in same:
                    names[who].pop(name, None)
                if who in stored:
                    names[who][kept] = stored[who]
        if len(classes) > 1:
            parted += sorted(f"'{same[0]}'" for same, _ in classes)
    config = skeleton.untied(base.config) if parted and shared[""] else base.config
    if parted:
        notes.append(
            f"{' and '.join(parted)} are apart in some of base and members: the merge has both, and does not tie them"
        )
    return (
        _seen(base, names[""], config),
        {
            who: _seen(c, names[who], skeleton.untied(c.config) if parted and shared[who] else c.config)
            for who, c in members.items()
        },
    )


def _classes(
    group: Sequence[str], checkpoints: Mapping[str, Checkpoint], shared: Mapping[str, Mapping[str, str]]
) -> list[tuple[list[str], dict[str, str]]]:
    """Names that are one weight in every checkpoint that has them, with the stored tensor of each that has it."""
    classes: list[tuple[list[str], dict[str, str]]] = []
    for name in group:
        held = {
            who: shared[who].get(name, name)
            for who, checkpoint in checkpoints.items()
            if name in shared[who] or name in checkpoint.tensors
        }
        for same, stored in classes:
            if all(stored.get(who, own) == own for who, own in held.items()):
                same.append(name)
                stored |= held
                break
        else:
            classes.append(([name], held))
    return classes


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
        for key, info in checkpoint.tensors.items():
            parts = key.split(".")
            if len(info.shape) == 2 and not any(part.isdigit() for part in parts):
                shapes[info.shape].add(".".join(parts[-2:]))
    return any(len(endings) > 1 for endings in shapes.values())


def _said(config: Mapping[str, Any]) -> Iterator[bool]:
    """What a configuration, and those within it, say of ties."""
    for key, value in config.items():
        if key == "tie_word_embeddings":
            yield bool(value)
        elif isinstance(value, Mapping):
            yield from _said(value)


def _shared(checkpoint: Checkpoint) -> dict[str, str]:
    """Name → the stored tensor that it has, of all names that the checkpoint's own model ties; nothing where that is unknown.

    As transformers loads it: a name that is not stored has the tensor of one that is, and names that are stored with
    different values are not tied.
    """
    try:
        model = skeleton.build(checkpoint.path, checkpoint.config, checkpoint.architecture)
    except CheckpointError:
        return {}
    stored: dict[str, str] = {}
    for name, live in skeleton.live_names(model, checkpoint.tensors).items():
        stored.setdefault(live, name)
    saved = skeleton.saved_names(model)
    found: dict[str, str] = {}
    for names in skeleton.tied_names(model):
        there = [stored[name] for name in names if name in stored]
        if not there:
            continue
        for name in names:
            own = stored.get(name)
            same = own is None or _equal(checkpoint, there[0], own)
            found[saved[name] if own is None else own] = there[0] if same or own is None else own
    return found


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two stored tensors hold the same numbers; looked at once as long as the files stay the same."""
    if first == second:
        return True
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False

    def look() -> str:
        return str(torch.equal(checkpoint.read(first), checkpoint.read(second)))

    lasting = not storage.is_local(checkpoint.path)
    return fact_cache.remembered((*checkpoint.identity, "equal", first, second), look, lasting=lasting) == str(True)


def _joined(shared: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Names that any checkpoint ties to each other, group by group, each name in one group."""
    groups: list[set[str]] = []
    for found in shared.values():
        own: dict[str, set[str]] = defaultdict(set)
        for name, stored in found.items():
            own[stored] |= {name, stored}
        for group in own.values():
            touching = [other for other in groups if other & group]
            groups = [other for other in groups if not other & group] + [group.union(*touching)]
    order = [name for found in shared.values() for name in found]
    return [sorted(group, key=order.index) for group in groups]
