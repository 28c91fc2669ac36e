"""Members whose tokens are not the base's: rows of embeddings are matched by token, and added ones dropped or kept."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from merging.checkpoints.models import skeleton
from merging.checkpoints.view import View
from merging.errors import CheckpointError, PoolError, StorageError
from merging.io import addresses, documents, storage

Vocabulary: TypeAlias = Literal["base", "union"]
"""Which tokens a merge has: the base's, or those that members added too."""
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
BY_WORDS = ("WordLevel", "WordPiece")
"""Kinds of tokenizer whose vocabulary is all that they are made of."""
MAX_LISTED = 8


@dataclass(frozen=True)
class Rows:
    """Where the rows of a merged embedding lie in a checkpoint's own.

    Args:
        dim: The dimension that counts tokens.
        index: Of every token of the merge the row in the checkpoint, −1 where it has none.
        missing: Gives the tensor, in the merge's shape, whose rows stand in for those.
    """

    dim: int
    index: Tensor
    missing: Callable[[], Tensor]

    def apply(self, value: Tensor) -> Tensor:
        """The checkpoint's tensor with the merge's rows, in its own dtype."""
        found = value.index_select(self.dim, self.index.clamp(min=0))
        absent = (self.index < 0).nonzero()[:, 0]
        if len(absent):
            found.index_copy_(self.dim, absent, self.missing().index_select(self.dim, absent).to(found.dtype))
        return found


@dataclass(frozen=True)
class Renumbered(View):
    """A checkpoint whose embeddings have the merge's rows.

    Args:
        rows: Name → where its rows lie.
        moves_tokens: Whether a token of its own tokenizer has another row in the merge, or none.
    """

    rows: Mapping[str, Rows]
    moves_tokens: bool

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, with the merge's rows."""
        value = super().read(name)
        return self.rows[name].apply(value) if name in self.rows else value

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The source's, but for tensors that get other rows."""
        return None if name in self.rows else super().factors(name)

    @property
    def is_mapped(self) -> bool:
        """No: embeddings are formed when they are read."""
        return False

    def advise(self, name: str, advice: int, start: int = 0, stop: int | None = None) -> None:
        """Tells the system about the use of bytes of a tensor that is as it is stored."""


@dataclass(frozen=True)
class _Tokens:
    """A checkpoint's tokenizer.

    Args:
        ids: Token → its row.
        added: Token → its entry among the tokens that were added to the tokenizer's model.
        kind: The kind of that model.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str


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
    raw = {who: _tokenizer_bytes(checkpoint.path) for who, checkpoint in everyone.items()}
    other = [who for who in members if raw[who] is not None and raw[who] != raw[""]]
    resized = [who for who, checkpoint in members.items() if _is_resized(base, checkpoint)]
    if not other and not resized:
        return base, dict(members), {}
    tokens = {who: _tokens(everyone[who].path, raw[who]) for who in ("", *other)}
    ours = tokens[""]
    added = _added(ours, {who: tokens[who] for who in other}) if vocabulary == "union" else {}
    moved = [who for who in other if ours is not None and _differ(ours, tokens[who])]
    touched = [who for who in members if who in {*resized, *moved, *(who for who, _ in added.values())}]
    notes += [note for who in other if who not in touched for note in _lost(who, ours, tokens[who], added)]
    if not touched:
        return base, dict(members), {}
    axes = {who: _axes(everyone[who]) for who in ("", *(members if added else touched))}
    if not axes[""]:
        return base, dict(members), {}
    if vocabulary == "union" and (unknown := [who for who in resized if ours is None or tokens.get(who) is None]):
        raise PoolError(
            f"`vocabulary: union` adds tokens by name, and {unknown[0]} or the base has no {TOKENIZER}: save their tokenizers "
            "there, or set `vocabulary: base`"
        )
    first = max(ours.ids.values(), default=-1) + 1 if ours is not None else 0
    wanted = [*added]  # the token of row first + n
    rows = {
        who: {
            key: (
                name,
                _index(ours, tokens.get(who, ours), wanted, first, *_sizes(base, axes[""][key][0], c, name, dim)),
                dim,
            )
            for key, (name, dim) in axes[who].items()
            if key in axes[""]
        }
        for who, c in everyone.items()
        if who in axes
    }
    files: dict[str, bytes] = {}
    seen = base
    if added and ours is not None:
        files = _with_tokens(base.path, ours, added, tokens, first)
        filled = {}
        for key, (name, index, dim) in rows[""].items():
            parts = [(members[who], own[key][0], own[key][1]) for who, own in rows.items() if who and key in own]
            shape = _resized(base.tensors[name].shape, dim, len(index))
            filled[name] = Rows(dim, index, _Mean(shape, dim, index, parts))
        seen = _renumbered(base, filled, ours, resize=True)
    views = dict(members)
    for who in members:
        if who in rows and (who in touched or added):
            own = {
                name: Rows(dim, index, _Read(seen, axes[""][key][0])) for key, (name, index, dim) in rows[who].items()
            }
            views[who] = _renumbered(members[who], own, tokens.get(who, ours), resize=bool(added))
    notes += _notes(vocabulary, ours, tokens, touched, rows, members, added)
    return seen, views, files


@dataclass(frozen=True)
class _Read:
    """Reads a tensor of a checkpoint."""

    checkpoint: Checkpoint
    name: str

    def __call__(self) -> Tensor:
        return self.checkpoint.read(self.name)


@dataclass(frozen=True)
class _Mean:
    """Reads the mean of the members that have a row that the base lacks; 0 where none has it.

    Args:
        shape: Of the merge's tensor.
        dim: The dimension that counts tokens.
        own: The base's own rows, as in `Rows.index`.
        parts: Each member's checkpoint, its name of the tensor, and its rows.
    """

    shape: tuple[int, ...]
    dim: int
    own: Tensor
    parts: Sequence[tuple[Checkpoint, str, Tensor]]

    def __call__(self) -> Tensor:
        total, counts = torch.zeros(self.shape), torch.zeros(len(self.own))
        for checkpoint, name, index in self.parts:
            there = ((self.own < 0) & (index >= 0)).nonzero()[:, 0]
            if len(there):
                total.index_add_(self.dim, there, checkpoint.read(name).index_select(self.dim, index[there]).float())
                counts[there] += 1
        return total / counts.clamp(min=1).reshape([-1 if d == self.dim else 1 for d in range(len(self.shape))])


def _resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return tuple(size if d == dim else extent for d, extent in enumerate(shape))


def _renumbered(
    checkpoint: Checkpoint, rows: Mapping[str, Rows], tokens: _Tokens | None, *, resize: bool
) -> Renumbered:
    """A checkpoint with these rows; its configuration has their number."""
    moves = False
    tensors = dict(checkpoint.tensors)
    for name, found in rows.items():
        info = tensors[name]
        places = torch.tensor(sorted(tokens.ids.values()) if tokens is not None else range(info.shape[found.dim]))
        within = places[places < len(found.index)]
        moves = moves or len(within) < len(places) or not torch.equal(found.index[within], within)
        shape = _resized(info.shape, found.dim, len(found.index))
        tensors[name] = TensorInfo(
            name, info.dtype, tuple(shape), "", 0, torch.Size(shape).numel() * info.dtype.itemsize
        )
    config = dict(checkpoint.config)
    if resize and rows:
        config = _sized(config, max(len(found.index) for found in rows.values()))
    names = {name: name for name in checkpoint.tensors}
    return Renumbered(checkpoint.path, config, tensors, {}, checkpoint, names, dict(rows), moves)


def _sized(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A configuration with another number of tokens, where it or the one of its text model says one."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        own = {"vocab_size": size} if "vocab_size" in config else {}
        return {**config, **own, "text_config": {**text, "vocab_size": size}}
    return {**config, "vocab_size": size}


def _is_resized(base: Checkpoint, member: Checkpoint) -> bool:
    """Whether a tensor outside of layers has another shape than the base's of the same name."""

    def outer(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        return {
            ".".join(key.split(".")[-2:]): info.shape
            for key, info in checkpoint.tensors.items()
            if info.shape and not any(part.isdigit() for part in key.split("."))
        }

    ours, theirs = outer(base), outer(member)
    for key in ours.keys() & theirs.keys():
        changed = [one for one, other in zip(ours[key], theirs[key], strict=False) if one != other]
        if (
            len(ours[key]) == len(theirs[key])
            and len(changed) == 1
            and changed[0] == (_stated(base.config) or changed[0])
        ):
            return True
    return False


def _axes(checkpoint: Checkpoint) -> dict[str, tuple[str, int]]:
    """Name in the backbone → name in the checkpoint and dimension, of every tensor with a row for each token.

    Those are the parameters and buffers whose shape changes where the configuration counts one token more.
    """
    vocab = _vocab_size(checkpoint.config)
    if vocab is None:
        return {}
    try:
        models = [
            skeleton.build(checkpoint.path, _sized(checkpoint.config, size), checkpoint.architecture)
            for size in (vocab, vocab + 1)
        ]
    except CheckpointError:
        return {}
    shapes = [
        {
            name: value.shape
            for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
            for name, value in named
        }
        for model in models
    ]
    prefix = f"{getattr(models[0], 'base_model_prefix', '')}."
    found = {}
    for name, live in skeleton.live_names(models[0], checkpoint.tensors).items():
        one, more = shapes[0][live], shapes[1][live]
        grown = [dim for dim, (before, after) in enumerate(zip(one, more, strict=True)) if before != after]
        if len(grown) == 1 and len(checkpoint.tensors[name].shape) == len(one):
            found[live.removeprefix(prefix)] = (name, grown[0])
    return found


def _stated(config: Mapping[str, Any]) -> Any:
    """The number of tokens, as a configuration or the one of its text model says it."""
    text = config.get("text_config")
    inner = text.get("vocab_size") if isinstance(text, Mapping) else None
    return inner if inner is not None else config.get("vocab_size")


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    size = _stated(config)
    if size is None and not isinstance(config.get("text_config"), Mapping):
        try:
            size = getattr(skeleton.parsed(config), "vocab_size", None)
        except Exception:  # transformers raises all kinds
            return None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _sizes(base: Checkpoint, ours: str, checkpoint: Checkpoint, name: str, dim: int) -> tuple[int, int]:
    """Number of rows of the base's tensor and of a checkpoint's own."""
    return base.tensors[ours].shape[dim], checkpoint.tensors[name].shape[dim]


def _index(
    ours: _Tokens | None, theirs: _Tokens | None, wanted: Sequence[str], first: int, base_rows: int, own_rows: int
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


def _differ(ours: _Tokens, theirs: _Tokens | None) -> bool:
    """Whether a token that both have stands in another row."""
    return theirs is not None and any(theirs.ids.get(token, row) != row for token, row in ours.ids.items())


def _added(ours: _Tokens | None, theirs: Mapping[str, _Tokens | None]) -> dict[str, tuple[str, int]]:
    """Token that the base lacks → the first member that has it and its row there, in the members' order."""
    found: dict[str, tuple[str, int]] = {}
    if ours is None:
        return found
    for who, tokens in theirs.items():
        if tokens is not None:
            for token, row in sorted(tokens.ids.items(), key=lambda pair: pair[1]):
                if token not in ours.ids:
                    found.setdefault(token, (who, row))
    return found


def _tokenizer_bytes(path: str) -> bytes | None:
    """A checkpoint's `tokenizer.json`; None where there is none."""
    if TOKENIZER not in storage.list_dir(path):
        return None
    try:
        return storage.read_bytes(addresses.join(path, TOKENIZER))
    except StorageError as error:
        raise PoolError(str(error)) from error


def _tokens(path: str, raw: bytes | None) -> _Tokens | None:
    """The tokens of a `tokenizer.json`.

    Raises:
        PoolError: It cannot be understood.
    """
    if raw is None:
        return None
    try:
        model = json.loads(raw)["model"]
        vocab = model["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {token: row for row, (token, _) in enumerate(vocab)}
        added = {entry["content"]: entry for entry in json.loads(raw).get("added_tokens") or []}
        ids |= {token: entry["id"] for token, entry in added.items()}
        if not all(isinstance(token, str) and isinstance(row, int) and row >= 0 for token, row in ids.items()):
            raise TypeError("a token is no text, or its row no number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PoolError(
            f"{addresses.join(path, TOKENIZER)} is no tokenizer that can be read ({error!r}): save it again"
        ) from error
    return _Tokens(ids, added, str(model.get("type")))


def _with_tokens(
    path: str,
    ours: _Tokens,
    added: Mapping[str, tuple[str, int]],
    tokens: Mapping[str, _Tokens | None],
    first: int,
) -> dict[str, bytes]:
    """The base's tokenizer files with further tokens.

    Raises:
        PoolError: A token belongs to a tokenizer's model, and not to what was added to it.
    """
    value = json.loads(storage.read_bytes(addresses.join(path, TOKENIZER)))
    entries = {}
    for row, (token, (who, _)) in enumerate(added.items(), first):
        theirs = tokens[who]
        entry = theirs.added.get(token) if theirs is not None else None
        if entry is not None:
            entries[row] = {**entry, "id": row}
        elif ours.kind in BY_WORDS:
            value["model"]["vocab"][token] = row
        else:
            raise PoolError(
                f"`vocabulary: union`: {who}'s token {token!r} is part of its {theirs.kind if theirs else ''} model, which "
                "cannot be joined with the base's: only added tokens can. Leave that member out, or set `vocabulary: base`"
            )
    value["added_tokens"] = [*(value.get("added_tokens") or []), *entries.values()]
    files = {TOKENIZER: json.dumps(value, indent=2, ensure_ascii=False).encode()}
    if entries and TOKENIZER_CONFIG in storage.list_dir(path):
        settings = documents.read_json(addresses.join(path, TOKENIZER_CONFIG))
        if isinstance(settings, dict) and isinstance(settings.get("added_tokens_decoder"), dict):
            settings["added_tokens_decoder"] |= {
                str(row): {key: value for key, value in entry.items() if key != "id"} for row, entry in entries.items()
            }
            files[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _notes(
    vocabulary: Vocabulary,
    ours: _Tokens | None,
    tokens: Mapping[str, _Tokens | None],
    touched: Sequence[str],
    rows: Mapping[str, Mapping[str, tuple[str, Tensor, int]]],
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
        for name, index, dim in rows.get(who, {}).values():
            there = members[who].tensors[name].shape[dim]
            if there > len(index):
                notes.append(
                    f"{who}: rows {len(index)} to {there - 1} of '{name}' are not in the merge; without a {TOKENIZER} of "
                    "base and member, rows are matched by their place"
                )
            elif there < len(index):
                notes.append(f"{who}: '{name}' lacks rows {there} to {len(index) - 1}, which are the base's")
    return notes


def _lost(who: str, ours: _Tokens | None, theirs: _Tokens | None, added: Mapping[str, tuple[str, int]]) -> list[str]:
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
