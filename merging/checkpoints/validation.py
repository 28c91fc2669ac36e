"""Every byte of a pool, read once: is it usable, how far are the members from the base, and what are its fingerprints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf, isfinite

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import Digest
from merging.checkpoints.formats.buffers import is_buffer
from merging.checkpoints.pool import MAX_REPORTED, Pool
from merging.errors import PoolError, StorageError
from merging.io import addresses, fact_cache, hashing
from merging.io.documents import as_object, is_number, parse_json
from merging.kernels import cpu
from merging.kernels.blockwise import Scratch, difference, is_finite, spans
from merging.recipe import BASE

MAX_DISTANCE = 0.9
"""‖θ_t − θ_0‖ / ‖θ_0‖ above which a member was hardly fine-tuned from the base: independent models lie near √2."""
SLICE = 8
"""Members that are read beside the base at once: what is on its way is bounded, and the base is read again for the next."""
THREADS = 4
"""Weights that are looked at at the same time."""
ASKED_AT_ONCE = 16
"""Members whose servers are asked at the same time whether their files are still the same."""


@dataclass(frozen=True)
class Finding:
    """What one reading of a member tells.

    Args:
        square: ‖θ_t − θ_0‖² over matrices: the ones of normalisation layers would hide how far two models are apart.
        base_square: ‖θ_0‖² over the same.
        problems: Weights that no merge survives, of the member and of the base.
    """

    square: float
    base_square: float
    problems: tuple[str, ...] = ()


def examine(pool: Pool, members: Sequence[str], most: int | None = None) -> dict[str, Finding]:
    """Reads base and members once, side by side; fingerprints that come of it are kept in memory.

    Args:
        pool: The pool.
        members: Which of its members.
        most: Entries of a weight to look at, from its middle; by default all, and the tensors that are not merged too.

    Returns:
        Member → finding.
    """
    reading = _Reading(pool, members, most)
    pool.base.prefetch(pool.weights)
    pool.prefetch(pool.weights, members)
    with ThreadPoolExecutor(THREADS) as threads:
        rows = list(threads.map(reading.weight, pool.weights))
        if most is None:
            reading.rest(threads)
    total, *moved = (sum(column) for column in zip(*rows, strict=True))
    return {
        member: Finding(square, total, tuple(sorted(reading.problems[BASE] + reading.problems[member])))
        for member, square in zip(members, moved, strict=True)
    }


def slices(members: Sequence[str], parts: int = 1) -> Iterator[tuple[str, ...]]:
    """Members in at least so many groups, if there are as many members, none of more than `SLICE`."""
    count = max(1, min(parts, len(members)), -(-len(members) // SLICE))
    bounds = [len(members) * number // count for number in range(count + 1)]
    return (tuple(members[start:stop]) for start, stop in pairwise(bounds))


def recall(pool: Pool) -> dict[str, Finding]:
    """What is known of members since an earlier reading, if neither their files nor the base's have changed since."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        cached = dict(
            zip(pool.members, threads.map(lambda who: fact_cache.recalled(key(pool, who)), pool.members), strict=True)
        )
    findings = {member: _from_json(fact) for member, fact in cached.items() if fact is not None}
    return {member: finding for member, finding in findings.items() if finding is not None}


def keep(pool: Pool, findings: Mapping[str, Finding]) -> None:
    """Keeps what is good, for later readings; what is bad shall be looked at again."""
    for member, finding in findings.items():
        if not finding.problems:
            lasting = not addresses.is_local(pool.members[member].checkpoint.path)
            fact_cache.keep(key(pool, member), json.dumps(asdict(finding)), lasting=lasting)


def key(pool: Pool, member: str) -> tuple[str, ...]:
    """What a member's finding depends on."""
    names = hashing.fingerprint([[name, list(info.shape)] for name, info in pool.weights.items()])
    return ("examined", "2", names, *pool.base.identity, *pool.members[member].checkpoint.identity)


def distances(
    pool: Pool, findings: Mapping[str, Finding], max_distance: float | None = MAX_DISTANCE
) -> dict[str, float]:
    """Each member's relative distance from the base, ‖θ_t − θ_0‖ / ‖θ_0‖ over matrices.

    Args:
        pool: The pool.
        findings: Member → finding.
        max_distance: The largest distance of a member; None for no bound.

    Raises:
        PoolError: NaN or Inf, named by tensor and member; or a member that was not fine-tuned from this base.
    """
    if problems := sorted({problem for finding in findings.values() for problem in finding.problems}):
        shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_REPORTED])
        raise PoolError(
            f"unusable weights ({len(problems)} tensors):\n{shown}\nCopy the checkpoint again, or leave it out"
        )
    by_member = {
        member: (findings[member].square / max(findings[member].base_square, 1e-30)) ** 0.5 for member in pool.members
    }
    bound = inf if max_distance is None else max_distance
    far = [f"{name} ({distance:.2f})" for name, distance in by_member.items() if distance > bound]
    if far:
        raise PoolError(
            f"not fine-tuned from the base {pool.base.path}: {', '.join(far)}. The number is ‖θ_t − θ_0‖ / ‖θ_0‖, which "
            f"stays far below {MAX_DISTANCE} in fine-tuning. Name the base that these members were trained from; or, if "
            f"members so far from it are meant, set `max_distance` (now {bound:g}; null for no bound)"
        )
    return by_member


def check_weights(pool: Pool, most: int | None = None, max_distance: float | None = MAX_DISTANCE) -> dict[str, float]:
    """Reads every merged weight once, looking for what no merge survives.

    Args:
        pool: The pool.
        most: Entries of a weight to look at, from its middle, where it is read by memory map; by default all.
        max_distance: The largest distance of a member; None for no bound.

    Returns:
        Each member's relative distance from the base.

    Raises:
        PoolError: NaN or Inf, named by tensor and member; or a member that was not fine-tuned from this base.
    """
    findings: dict[str, Finding] = {}
    for group in slices(list(pool.members)):
        findings |= examine(pool, group, most)
    return distances(pool, findings, max_distance)


class _Reading:
    """One pass over base and members, a weight at a time, from several threads."""

    def __init__(self, pool: Pool, members: Sequence[str], most: int | None) -> None:
        self._pool, self._members, self._most = pool, members, most
        self.problems: dict[str, list[str]] = {who: [] for who in (BASE, *members)}
        checkpoints = {BASE: pool.base} | {member: pool.members[member].checkpoint for member in members}
        self._digests: dict[str, Digest] = {
            who: Digest(checkpoint)
            for who, checkpoint in checkpoints.items()
            if most is None and checkpoint.hashes_tensors and not checkpoint.is_recognised
        }

    def weight(self, name: str) -> list[float]:
        """‖θ_0‖² of a weight, and each member's ‖θ_t − θ_0‖²; nothing of a vector."""
        parts = []
        for who in (BASE, *self._members):
            own = name if who == BASE else self._pool.members[who].names[name]
            value = self._pool.base_weight(name) if who == BASE else self._pool.member_weight(who, name)
            if who in self._digests:
                self._digests[who].add(own, value)
            parts.append(self._looked_at(value))
        base, *members = parts
        *moved, square = _squares(base, members)
        if not isfinite(square + sum(moved)):
            for who, part in zip((BASE, *self._members), parts, strict=True):
                if not is_finite(part):
                    self.problems[who].append(f"{who}: '{name}' holds NaN or Inf")
        return [square, *moved] if len(self._pool.weights[name].shape) > 1 else [0.0] * len(parts)

    def rest(self, threads: ThreadPoolExecutor) -> None:
        """What is not merged: members' heads, which must be usable too, and the rest, for the fingerprints."""
        for who in (BASE, *self._members):
            checkpoint = self._pool.base if who == BASE else self._pool.members[who].checkpoint
            digest = self._digests.get(who)
            heads = set() if who == BASE else set(self._pool.members[who].head)
            names = [n for n in checkpoint.tensors if n in heads or (digest is not None and n not in digest.names)]
            checkpoint.prefetch(names)
            list(threads.map(lambda name, who=who, heads=heads: self._unmerged(who, name, name in heads), names))
            if digest is not None:
                checkpoint.recognise(digest.fingerprint())

    def _unmerged(self, who: str, name: str, is_head: bool) -> None:
        checkpoint = self._pool.base if who == BASE else self._pool.members[who].checkpoint
        value = checkpoint.read(name)
        if who in self._digests:
            self._digests[who].add(name, value)
        is_parameter = value.is_floating_point() and not is_buffer(name, tuple(value.shape))
        if is_head and is_parameter and not is_finite(value.reshape(-1)):
            self.problems[who].append(f"{who}: '{name}' of its head holds NaN or Inf")

    def _looked_at(self, weight: Tensor) -> Tensor:
        size = weight.numel()
        most = self._most or size
        start = max((size - most) // 2, 0)
        return weight.reshape(-1)[start : start + most]


def _squares(base: Tensor, values: Sequence[Tensor]) -> list[float]:
    """‖value − base‖² of every vector, and ‖base‖², in memory for a block of them."""
    if cpu.fits(base, *values) and (sums := cpu.squares(base, values)) is not None:
        return sums
    scratch = Scratch()
    totals = [0.0] * (len(values) + 1)
    zeros = torch.zeros((), dtype=base.dtype).expand(base.shape)
    for number, (value, origin) in enumerate([*((value, base) for value in values), (base, zeros)]):
        for start, stop in spans(value.numel(), value.device):
            row = scratch.take("row", stop - start, device=value.device)
            moved = difference(value[start:stop], origin[start:stop], row)
            totals[number] += float(torch.dot(moved, moved))
    return totals


def _from_json(fact: str) -> Finding | None:
    """A finding that was kept; None if it is something else."""
    try:
        values = as_object(parse_json(fact, "a finding"), "a finding")
    except StorageError:
        return None
    square, base_square = values.get("square"), values.get("base_square")
    if values.get("problems") != [] or not is_number(square) or not is_number(base_square):
        return None
    return Finding(square, base_square) if min(square, base_square) >= 0 else None
