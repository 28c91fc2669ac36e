"""Layers of base and members one after another: a checkpoint with another number of layers (passthrough, "frankenmerge")."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import CONFIG, Checkpoint
from merging.checkpoints.directories.writer import SHARD_BYTES, FileLayout, WeightFiles, lay_out, new_checkpoint
from merging.checkpoints.formats.configuration import resolved_config
from merging.checkpoints.models import skeleton
from merging.checkpoints.pool import Pool
from merging.errors import MethodError, PoolError
from merging.kernels.blockwise import is_finite
from merging.methods.depth import NUMBER
from merging.recipe import BASE
from merging.registry import did_you_mean

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configurations call the number of layers."""
INDICES = ("mlp_only_layers", "cross_attention_layers", "moe_layers")
"""Lists of layers' numbers."""
BY_PLACE = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers", "hybrid_override_pattern", "attention_types")
"""Fields that, if set, make what a layer computes depend on its place in a way that cannot go with it."""
PERIODS = ("global_attn_every_n_layers", "full_attention_interval", "sliding_window_pattern", "attn_layer_period")
"""Fields that say every how many layers one is of another kind, where no list says of which kind each is."""


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of one model.

    Args:
        source: A member, or `base`.
        first: The first layer, from 0.
        last: The last, which belongs to it; None for the model's last.
        scale: Pattern of weights' names → what they are multiplied by; weights of no pattern stay as they are.
    """

    source: str
    first: int
    last: int | None
    scale: Mapping[str, float]


@dataclass(frozen=True)
class _Piece:
    """A tensor to be written: the base's name of what it is made of, whose, and what it is multiplied by."""

    original: str
    source: str
    scale: float = 1.0


def layers(text: str) -> tuple[int, int | None]:
    """The first and last layer of `3`, `0-2` or `9-` (to the end).

    Raises:
        MethodError: It is written otherwise.
    """
    match = re.fullmatch(r"(\d{1,6})(-(\d{1,6})?)?", text)
    if match is None or (match[3] and int(match[3]) < int(match[1])):
        raise MethodError(f"'{text}' names no layers: write '3', '0-2', or '9-' to the end")
    return int(match[1]), int(match[3]) if match[3] else None if match[2] else int(match[1])


def write_slices(
    pool: Pool,
    slices: Sequence[Slice],
    path: str,
    *,
    rest: str | Mapping[str, str] = BASE,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    extra: Mapping[str, str | bytes | None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a model of these layers as a Hugging Face directory like the base's, whole or not at all.

    Transformers builds the model from the new configuration, which must ask for the weights that are written: layers of
    several kinds (attention, experts) keep theirs or are refused.

    Args:
        pool: Base and members.
        slices: The layers, from the first to the last.
        path: The directory to write; an earlier merge that is there is replaced.
        rest: Whose embeddings, norms and head, which belong to no layer: a member, or `base`; or for patterns of their names,
            the first that fits, the base being the rest.
        dtype: Of floating-point weights; the base's by default.
        max_shard_bytes: An output file is closed before it exceeds this.
        threads: Files written side by side; by default as many as there are processors to this process.
        extra: Further small files, by their path below the directory.
        progress: Told how many of how many entries are written.

    Returns:
        The number of layers.

    Raises:
        MethodError: A slice names layers, members or weights that are not there, or the architecture has no plain stack of
            layers.
        CheckpointError: Transformers cannot build the model.
        PoolError: A checkpoint holds NaN or Inf; nothing is written.
        StorageError: There is no right or no space to write.
    """
    prefix, count, level = _stack(pool.base)
    picks = list(_picks(pool, slices, count))
    pieces = _pieces(pool, prefix, picks, rest)
    config = _config(pool.base, level, count, [layer for _, layer, _ in picks], dtype)
    _check(pool.base, config, pieces)
    outlines = []
    for name, piece in pieces.items():
        info = pool.base.tensors[piece.original]
        outlines.append((name, dtype if dtype and info.dtype.is_floating_point else info.dtype, info.shape))
    shards = lay_out(outlines, max_shard_bytes)
    small = {**pool.files, **(extra or {}), CONFIG: json.dumps(config, indent=2) + "\n"}
    done, total = 0, sum(torch.Size(shape).numel() for _, _, shape in outlines)
    with (
        new_checkpoint(path, shards, like=pool.base, extra=small) as files,
        ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as workers,
    ):
        for entries in workers.map(lambda shard: _write(pool, files, shard, pieces), shards):
            done += entries
            progress(done, total)
    return len(picks)


def _stack(base: Checkpoint) -> tuple[str, int, str | None]:
    """What the names of a model's layers begin with, how many there are, and the part of the configuration that says so.

    Raises:
        MethodError: There is no stack of as many layers as the configuration says, or there are several.
    """
    inner = base.config.get("text_config")
    level = None if any(key in base.config for key in COUNTS) or not isinstance(inner, Mapping) else "text_config"
    config = base.config if level is None else base.config[level]
    counts = {config[key] for key in COUNTS if key in config}
    stacks: dict[str, set[int]] = {}
    for name in base.tensors:
        if match := NUMBER.search(name):
            stacks.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    chosen = [prefix for prefix, numbers in stacks.items() if counts == {len(numbers)} == {max(numbers) + 1}]
    if len(chosen) != 1:
        which = f"several ({', '.join(chosen)})" if chosen else "none"
        raise MethodError(
            f"slices need one stack of layers with as many as {' or '.join(COUNTS)} in config.json says; {base.path} has "
            f"{which}: merge models of one stack (a decoder, an encoder)"
        )
    return chosen[0], *counts, level


def _picks(pool: Pool, slices: Sequence[Slice], count: int) -> Iterator[tuple[str, int, Slice]]:
    """Whose layer each is, its number there, and the slice.

    Raises:
        MethodError: There is no such member or layer, or no slice.
    """
    if not slices:
        raise MethodError("a model needs at least one slice")
    for number, part in enumerate(slices):
        _known(pool, part.source, f"slices.{number}.source")
        last = count - 1 if part.last is None else part.last
        if part.first > last or last >= count:
            raise MethodError(f"slices.{number}.layers: the models have layers 0-{count - 1}, not {part.first}-{last}")
        for layer in range(part.first, last + 1):
            yield part.source, layer, part


def _known(pool: Pool, source: str, place: str) -> None:
    names = [BASE, *pool.members]
    if source not in names:
        raise MethodError(f"{place}: '{source}' is no member. {did_you_mean(source, names)}")


def _pieces(
    pool: Pool, prefix: str, picks: Sequence[tuple[str, int, Slice]], rest: str | Mapping[str, str]
) -> dict[str, _Piece]:
    """What is written, by its new name; layers where the base has its first.

    Raises:
        MethodError: A pattern of a slice has none of its weights, or two have the same.
    """
    owners = {"*": rest} if isinstance(rest, str) else {**rest, "*": rest.get("*", BASE)}
    for owner in owners.values():
        _known(pool, owner, "rest")
    own: dict[int, list[tuple[str, str]]] = {}
    for name in pool.base.tensors:
        if (match := NUMBER.search(name)) and name[: match.start(1)] == prefix:
            own.setdefault(int(match[1]), []).append((name, name[match.end(1) :]))
    idle = {(number, pattern) for number, (_, _, part) in enumerate(picks) for pattern in part.scale}
    stacked: dict[str, _Piece] = {}
    for number, (source, layer, part) in enumerate(picks):
        for original, suffix in own[layer]:
            fitting = [pattern for pattern in part.scale if fnmatchcase(original, pattern)]
            if len(fitting) > 1:
                raise MethodError(f"scale: '{original}' is meant by both '{fitting[0]}' and '{fitting[1]}'")
            idle -= {(number, pattern) for pattern in fitting}
            scale = part.scale[fitting[0]] if fitting and original in pool.weights else 1.0
            stacked[f"{prefix}{number}{suffix}"] = _Piece(original, source, scale)
    layered = {name for names in own.values() for name, _ in names}
    made: dict[str, _Piece] = {}
    for name in pool.base.tensors:
        made |= stacked if name in layered and not made.keys() & stacked.keys() else {}
        if name not in layered:
            made[name] = _Piece(name, next(who for pattern, who in owners.items() if fnmatchcase(name, pattern)))
    for number, pattern in sorted(idle):
        raise MethodError(f"scale: '{pattern}' has none of the weights of layer {picks[number][1]}")
    return made


def _config(
    base: Checkpoint, level: str | None, count: int, picks: Sequence[int], dtype: torch.dtype | None
) -> dict[str, Any]:
    """The configuration of a model of these of the base's layers.

    Raises:
        MethodError: What a layer computes depends on its place, and cannot go with it.
    """
    whole = dict(base.config)
    own = dict(whole if level is None else whole[level])
    before = _level(resolved_config(base.config), level, base)
    if by_place := [key for key in BY_PLACE if before.get(key)]:
        raise MethodError(f"{base.path}: with {by_place[0]} in config.json, what a layer computes depends on its place")
    lists = {
        key: value
        for key, value in before.items()
        if "layer" in key and key not in INDICES and isinstance(value, list) and len(value) == count
    }
    if not lists and (every := [key for key in PERIODS if isinstance(before.get(key), int) and before[key] > 1]):
        raise MethodError(f"{base.path}: with {every[0]} in config.json, what a layer computes depends on its place")
    own |= {key: len(picks) for key in COUNTS if key in own}
    wanted = {key: [value[layer] for layer in picks] for key, value in lists.items()}
    for key in INDICES:
        if before.get(key):
            wanted[key] = [place for place, layer in enumerate(picks) if layer in before[key]]
    own |= wanted
    if dtype is not None:
        word = str(dtype).removeprefix("torch.")
        whole |= {key: word for key in ("dtype", "torch_dtype") if key == "dtype" or key in whole}
        own |= {key: word for key in ("dtype", "torch_dtype") if key in own or (key == "dtype" and level is None)}
    changed = {**whole, **own} if level is None else {**whole, level: own}
    after = _level(resolved_config(changed), level, base)
    for key, value in wanted.items():
        if after.get(key) != value:
            raise MethodError(f"{base.path}: transformers does not take {key} from config.json as these layers need it")
    return changed


def _level(config: Mapping[str, Any] | None, level: str | None, base: Checkpoint) -> Mapping[str, Any]:
    """A part of a configuration as transformers resolves it.

    Raises:
        MethodError: Transformers does not know it, so that nothing says which layers are of one kind.
    """
    if config is None:
        raise MethodError(
            f"{base.path}: transformers cannot read its config.json with another number of layers, or does not know "
            f"'{base.config.get('model_type')}'"
        )
    level_config: Mapping[str, Any] = config if level is None else config[level]
    return level_config


def _check(base: Checkpoint, config: Mapping[str, Any], pieces: Mapping[str, _Piece]) -> None:
    """Whether the model that the configuration describes has the weights that are written, as the base's has the base's.

    Raises:
        MethodError: It has others.
        CheckpointError: Transformers cannot build it.
    """
    old = skeleton.build(base.path, base.config, base.architecture)
    new = skeleton.build(base.path, config, base.architecture)
    (before, known), (after, needed) = (
        (
            skeleton.live_names(model, names),
            {k: tuple(v.shape) for k, v in model.named_parameters(remove_duplicate=False)},
        )
        for model, names in ((old, list(base.tensors)), (new, list(pieces)))
    )
    spare = known.keys() - before.values()
    if missing := sorted(needed.keys() - after.values() - spare):
        raise MethodError(
            f"the layers do not fit: in this order the model needs '{missing[0]}', which they have not. Layers of "
            "different kinds keep their places (first dense, then experts)"
        )
    for name, piece in pieces.items():
        was, now = before.get(piece.original), after.get(name)
        if (was is None) != (now is None) or (was in known and now in needed and known[was] != needed[now]):
            raise MethodError(
                f"the layers do not fit: '{piece.original}' would be '{name}', where the model needs "
                f"{list(needed[now]) if now in needed else 'no such weight'}"
            )


def _write(pool: Pool, files: WeightFiles, shard: FileLayout, pieces: Mapping[str, _Piece]) -> int:
    """Writes a file; returns its number of entries."""
    entries = 0
    with files.open(shard) as put:
        for name, info in shard.tensors.items():
            value = _value(pool, pieces[name]).to(info.dtype).contiguous()
            if value.is_floating_point() and not is_finite(value):
                raise PoolError(
                    f"{pieces[name].source}: '{pieces[name].original}' holds NaN or Inf, or does as {info.dtype} times "
                    f"{pieces[name].scale:g}. Copy the checkpoint again, or choose another dtype or scale"
                )
            put(info.start, value)
            entries += value.numel()
    return entries


def _value(pool: Pool, piece: _Piece) -> Tensor:
    """A tensor, scaled in float32."""
    merged = piece.original in pool.weights
    if piece.source != BASE and merged:
        value = pool.member_weight(piece.source, piece.original)
    else:  # buffers, and what only the base has
        value = pool.base.read(piece.original)
    return value if piece.scale == 1 else value.float() * piece.scale
