"""Members whose tokens are not the base's: rows of embeddings are matched by token, and added ones dropped or kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.formats import vocab_size
from merging.checkpoints.formats.tokenizer_json import (
    TOKENIZER_JSON,
    Tokens,
    parse_tokens,
    tokenizer_bytes,
    with_tokens,
)
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.renaming import backbone_prefix
from merging.checkpoints.renumbered import Mean, Stored, TokenRows, renumbered, resized
from merging.errors import CheckpointError, PoolError

Vocabulary: TypeAlias = Literal["base", "union"]
"""Which tokens a merge has: the base's, or those that members added too."""
MAX_LISTED = 8


@dataclass(frozen=True)
class _Placed:
    """Where a checkpoint has the rows of one of the merge's tensors: its name of it, the rest as in `TokenRows`."""

    name: str
    dim: int
    index: Tensor


def settle_vocabulary(
    base: Checkpoint, members: Mapping[str, Checkpoint], vocabulary: Vocabulary, notes: list[str]
) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, bytes]]:
    """Base and members whose embeddings have the same tokens in the same rows.

    Args:
        base: The base.
        members: The members, by name.
        vocabulary: Whose tokens the merge has. `base`: what members added is dropped. `union`: tokens that the base lacks
            are added to it; a row that several members have is their mean in the base, and a member that lacks a row has
            the base's, so that its task vector is zero there.
        notes: What a user should know is added.

    Returns:
        The base and the members, as they are or as views; and the tokenizer's files where they change.

    Raises:
        PoolError: Tokens cannot be matched, or cannot be added to the base's tokenizer.
    """
    everyone = {"": base, **members}
    raw = {who: tokenizer_bytes(checkpoint.path) for who, checkpoint in everyone.items()}
    other = [who for who in members if raw[who] is not None and raw[who] != raw[""]]
    longer = [who for who, checkpoint in members.items() if _is_resized(base, checkpoint)]
    if not other and not longer:
        return base, dict(members), {}
    tokens = {who: parse_tokens(everyone[who].path, raw[who]) for who in ("", *other)}
    ours = tokens[""]
    added = _added(ours, {who: tokens[who] for who in other}) if vocabulary == "union" else {}
    moved = [who for who in other if ours is not None and _differ(ours, tokens[who])]
    touched = [who for who in members if who in {*longer, *moved, *(who for who, _ in added.values())}]
    notes += [note for who in other if who not in touched for note in _lost(who, ours, tokens[who], added)]
    if not touched:
        return base, dict(members), {}
    axes = {who: _axes(everyone[who]) for who in ("", *(members if added else touched))}
    if not axes[""]:
        return base, dict(members), {}
    if vocabulary == "union" and (unknown := [who for who in longer if ours is None or tokens.get(who) is None]):
        raise PoolError(
            f"`vocabulary: union` adds tokens by name, and {unknown[0]} or the base has no {TOKENIZER_JSON}: save their "
            "tokenizers there, or set `vocabulary: base`"
        )
    first = max(ours.ids.values(), default=-1) + 1 if ours is not None else 0
    wanted = [*added]  # the token of row first + n
    rows: dict[str, dict[str, _Placed]] = {}
    for who, own_axes in axes.items():
        rows[who] = {}
        for key, (name, dim) in own_axes.items():
            if key in axes[""]:
                sizes = base.tensors[axes[""][key][0]].shape[dim], everyone[who].tensors[name].shape[dim]
                rows[who][key] = _Placed(name, dim, _index(ours, tokens.get(who, ours), wanted, first, *sizes))
    files: dict[str, bytes] = {}
    seen = base
    if added and ours is not None:
        files = with_tokens(base.path, ours, added, tokens, first)
        filled = {}
        for key, place in rows[""].items():
            parts = [(members[who], own[key].name, own[key].index) for who, own in rows.items() if who and key in own]
            shape = resized(base.tensors[place.name].shape, place.dim, len(place.index))
            filled[place.name] = TokenRows(place.dim, place.index, Mean(shape, place.dim, place.index, parts))
        seen = renumbered(base, filled, ours, resize=True)
    views = dict(members)
    for who in members:
        if who in rows and (who in touched or added):
            own = {
                place.name: TokenRows(place.dim, place.index, Stored(seen, axes[""][key][0]))
                for key, place in rows[who].items()
            }
            views[who] = renumbered(members[who], own, tokens.get(who, ours), resize=bool(added))
    notes += _notes(ours, tokens, touched, rows, members, added)
    return seen, views, files


def _is_resized(base: Checkpoint, member: Checkpoint) -> bool:
    """Whether a tensor outside of layers has another shape than the base's of the same name."""
    ours, theirs = ({end: shape for end, shape in c.outside_layers() if shape} for c in (base, member))
    for key in ours.keys() & theirs.keys():
        changed = [one for one, other in zip(ours[key], theirs[key], strict=False) if one != other]
        if (
            len(ours[key]) == len(theirs[key])
            and len(changed) == 1
            and changed[0] == (vocab_size.stated(base.config) or changed[0])
        ):
            return True
    return False


def _axes(checkpoint: Checkpoint) -> dict[str, tuple[str, int]]:
    """Name in the backbone → name in the checkpoint and dimension, of every tensor with a row for each token.

    Those are the parameters and buffers whose shape changes where the configuration counts one token more.
    """
    vocab = vocab_size.resolved(checkpoint.config)
    if vocab is None:
        return {}
    try:
        models = [
            skeleton.build(checkpoint.path, vocab_size.replaced(checkpoint.config, size), checkpoint.architecture)
            for size in (vocab, vocab + 1)
        ]
    except CheckpointError:
        return {}
    known = [skeleton.tensors(model) for model in models]
    prefix = backbone_prefix(models[0])
    axes = {}
    for name, live in skeleton.live_names(models[0], checkpoint.tensors).items():
        one, more = (tensors[live].shape for tensors in known)
        grown = [dim for dim, (before, after) in enumerate(zip(one, more, strict=True)) if before != after]
        if len(grown) == 1 and len(checkpoint.tensors[name].shape) == len(one):
            axes[live.removeprefix(prefix)] = (name, grown[0])
    return axes


def _index(
    ours: Tokens | None, theirs: Tokens | None, wanted: Sequence[str], first: int, base_rows: int, own_rows: int
) -> Tensor:
    """Of every row of the merge the row in a checkpoint, −1 where it has none.

    Rows without a token, and tokens that were given another name in their place, keep their place.
    """
    size = max(base_rows, first + len(wanted)) if wanted else base_rows
    index = torch.arange(size)
    if ours is not None and theirs is not None:
        names = {row: token for token, row in ours.ids.items()}
        names |= {first + number: token for number, token in enumerate(wanted)}
        there = {row: token for token, row in theirs.ids.items()}
        known = {*ours.ids, *wanted}
        for row in range(size):
            token = names.get(row)
            other = there.get(row)
            if token is not None and token in theirs.ids:
                index[row] = theirs.ids[token]
            elif (wanted and ((row >= first and token is not None) or other is not None)) or (
                other in known and other != token
            ):
                index[row] = -1
    index[(index >= own_rows) | (index < 0)] = -1
    return index


def _differ(ours: Tokens, theirs: Tokens | None) -> bool:
    """Whether a token that both have stands in another row."""
    return theirs is not None and any(theirs.ids.get(token, row) != row for token, row in ours.ids.items())


def _added(ours: Tokens | None, theirs: Mapping[str, Tokens | None]) -> dict[str, tuple[str, int]]:
    """Token that the base lacks → the first member that has it and its row there, in the members' order."""
    added: dict[str, tuple[str, int]] = {}
    if ours is None:
        return added
    for who, tokens in theirs.items():
        if tokens is not None:
            for token, row in sorted(tokens.ids.items(), key=lambda pair: pair[1]):
                if token not in ours.ids:
                    added.setdefault(token, (who, row))
    return added


def _notes(
    ours: Tokens | None,
    tokens: Mapping[str, Tokens | None],
    touched: Sequence[str],
    rows: Mapping[str, Mapping[str, _Placed]],
    members: Mapping[str, Checkpoint],
    added: Mapping[str, tuple[str, int]],
) -> list[str]:
    """What becomes of the members' tokens."""
    notes = []
    if added:
        notes.append(f"vocabulary: {len(added)} tokens are added to the base's: {_listed(added)}")
    for who in touched:
        theirs = tokens.get(who)
        if ours is not None and theirs is not None:
            notes.append(f"{who}: rows of its embeddings are matched by token, and what it lacks is the base's")
            notes += _lost(who, ours, theirs, added)
            continue
        for place in rows.get(who, {}).values():
            name, index, there = place.name, place.index, members[who].tensors[place.name].shape[place.dim]
            if there > len(index):
                notes.append(
                    f"{who}: rows {len(index)} to {there - 1} of '{name}' are not in the merge; without a {TOKENIZER_JSON} of "
                    "base and member, rows are matched by their place"
                )
            elif there < len(index):
                notes.append(f"{who}: '{name}' lacks rows {there} to {len(index) - 1}, which are the base's")
    return notes


def _lost(who: str, ours: Tokens | None, theirs: Tokens | None, added: Mapping[str, tuple[str, int]]) -> list[str]:
    """A note on a member's tokens that the merge does not know, if there are any."""
    if ours is None or theirs is None:
        return []
    lost = [token for token in theirs.ids if token not in ours.ids and token not in added]
    if not lost:
        return []
    return [
        f"{who}: {len(lost)} tokens that the base lacks are not in the merge (`vocabulary: union` adds them): {_listed(lost)}"
    ]


def _listed(tokens: Iterable[str]) -> str:
    shown = [repr(token) for token in tokens]
    return ", ".join(shown[:MAX_LISTED]) + (f" and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else "")
