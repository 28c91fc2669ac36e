"""A base checkpoint and the members fine-tuned from it, compared before anything runs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import Tensor

from merging.checkpoints.adapters.adapter import open_checkpoint
from merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from merging.checkpoints.formats.buffers import is_buffer
from merging.checkpoints.formats.configuration import differences, function_of
from merging.checkpoints.layout import transposed_weights
from merging.checkpoints.tied_weights import settle_ties
from merging.checkpoints.vocabulary import Vocabulary, settle_vocabulary
from merging.errors import PoolError

MAX_REPORTED = 12
OPENED_AT_ONCE = 16
"""Members whose headers are read at the same time: from an object store, it is the number of answers that takes long."""


@dataclass(frozen=True)
class Member:
    """A checkpoint fine-tuned from the pool's base.

    Args:
        name: Its name in the pool.
        checkpoint: Its directory.
        names: The base's name of every merged weight to this checkpoint's name of it.
        head: This checkpoint's names of the tensors that are kept for its task and not merged.
    """

    name: str
    checkpoint: Checkpoint
    names: Mapping[str, str]
    head: tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """Base and members with the same weights.

    Args:
        base: The base checkpoint.
        members: The members, by name.
        weights: The base's names and places of the weights that are merged: floating-point, in base and all members.
        notes: What a user should know, though it is no error (mixed dtypes, tensors that only the base has).
        files: Small files of a merged checkpoint that are not as the base has them (a tokenizer with added tokens).
    """

    base: Checkpoint
    members: Mapping[str, Member]
    weights: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = field(default=())
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The base's `model_type`."""
        return str(self.base.config.get("model_type", ""))

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The base's names of the matrices that are stored [in, out]."""
        return transposed_weights(self.base)

    @classmethod
    def open(
        cls, base: str, members: Mapping[str, str], heads: Sequence[str] = (), vocabulary: Vocabulary = "base"
    ) -> "Pool":
        """Opens all checkpoints and compares names, shapes, dtypes, tied weights and architecture.

        Args:
            base: The base's directory.
            members: Each member's directory, by name: a model's, or that of a PEFT LoRA adapter of this base.
            heads: Patterns (`classifier.*`) of members' tensor names to keep per task though they could be merged.
                Tensors that the base lacks are kept per task without being named here.
            vocabulary: Whose tokens a merge has, where members' are not the base's: `base`, or `union`.

        Raises:
            CheckpointError: A directory is missing, damaged or unsafe.
            PoolError: Base and members disagree; every disagreement is in the message.
        """
        if not members:
            raise PoolError("a pool needs at least one member")
        origin = Checkpoint.open(base)
        with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
            opened = dict(
                zip(members, threads.map(lambda path: open_checkpoint(path, origin), members.values()), strict=True)
            )
        problems: list[str] = []
        notes: list[str] = []
        origin, opened = settle_ties(origin, opened, notes)
        origin, opened, files = settle_vocabulary(origin, opened, vocabulary, notes)
        found = {}
        for name, checkpoint in opened.items():
            problems += _config_problems(origin, name, checkpoint)
            found[name] = _match(origin, name, checkpoint, heads, problems)
        merged = _merged_names(origin, found, notes)
        problems += _absent(origin, found, merged)
        named = {"the base": origin, **{f"'{name}'": member.checkpoint for name, member in found.items()}}
        first = next((who for who, checkpoint in named.items() if _labels(checkpoint) is not None), "the base")
        for name, member in found.items():
            problems += _label_problems(origin, (first, _labels(named[first])), name, member, merged)
        for name, member in found.items():
            dtypes = {str(member.checkpoint.tensors[member.names[key]].dtype) for key in merged if key in member.names}
            dtypes |= {str(origin.tensors[key].dtype) for key in merged}
            if len(dtypes) > 1:
                notes.append(f"base and '{name}' mix dtypes ({', '.join(sorted(dtypes))})")
        if problems:
            shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_REPORTED])
            more = f"\n  … and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
            raise PoolError(
                f"base and members do not fit together:\n{shown}{more}\n"
                "Leave out the members named here, or name the base that they were fine-tuned from"
            )
        if not merged:
            kept = f": `heads` ({', '.join(heads)}) keeps them all per task" if heads else ""
            raise PoolError(f"base and members share no floating-point weights to merge{kept}")
        for pattern in heads:
            if not any(fnmatchcase(key, pattern) for one in (origin, *opened.values()) for key in one.tensors):
                notes.append(f"`heads`: no member has a tensor '{pattern}'")
        trimmed = {
            name: Member(
                name, member.checkpoint, {key: member.names[key] for key in merged}, member.head_in_file_order()
            )
            for name, member in found.items()
        }
        notes += [note for owner in trimmed.values() for note in _left_out(owner, origin, heads)]
        return cls(origin, trimmed, {key: origin.tensors[key] for key in merged}, tuple(notes), files)

    def base_weight(self, name: str) -> Tensor:
        """θ_0's weight, as stored."""
        return self.base.read(name)

    def member_weight(self, member: str, name: str) -> Tensor:
        """θ_t's weight, as stored; `name` is the base's."""
        chosen = self.members[member]
        return chosen.checkpoint.read(chosen.names[name])

    def member_factors(self, member: str, name: str) -> tuple[Tensor, Tensor] | None:
        """What an adapter adds to the base's weight, as two factors; None where the member holds the weight itself."""
        chosen = self.members[member]
        return chosen.checkpoint.factors(chosen.names[name])

    def prefetch(self, names: Iterable[str], members: Iterable[str] | None = None) -> None:
        """Says that weights are about to be read, best in this order.

        Args:
            names: The base's names.
            members: Of these members, and not of the base; by default of the base and all members.
        """
        names = list(names)
        if members is None:
            self.base.prefetch(names)
        for member in self.members if members is None else members:
            own = self.members[member]
            own.checkpoint.prefetch([own.names[name] for name in names])

    def copy_here(self) -> None:
        """Says that this machine will read weights again and again: remote files are copied here, if there is room."""
        self.base.copy_here()
        for member in self.members.values():
            member.checkpoint.copy_here()

    def find_copies(self) -> None:
        """Looks once more for copies of remote files, which evaluators on this machine may have made meanwhile."""
        self.base.find_copy()
        for member in self.members.values():
            member.checkpoint.find_copy()

    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the base (under `base`) and of each member."""
        return {"base": self.base.fingerprint} | {n: m.checkpoint.fingerprint for n, m in self.members.items()}

    def configurations(self) -> dict[str, dict[str, Any]]:
        """What of their `config.json` may change the function that base and members compute."""
        return {"base": function_of(self.base.config)} | {
            name: function_of(member.checkpoint.config) for name, member in self.members.items()
        }


@dataclass
class _Matched:
    """What a member's names were found to mean."""

    checkpoint: Checkpoint
    names: dict[str, str]
    head: list[str]

    def head_in_file_order(self) -> tuple[str, ...]:
        """`head`, as the checkpoint has it."""
        kept = set(self.head)
        return tuple(key for key in self.checkpoint.tensors if key in kept)


def _config_problems(base: Checkpoint, name: str, member: Checkpoint) -> list[str]:
    """Fields in which a member's configuration makes another function of the same weights than the base's."""
    return [
        f"{name}: config.json has {field} = {theirs!r}, the base has {ours!r}"
        for field, ours, theirs in differences(base.config, member.config)
    ]


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    """What may stand before a backbone's names: nothing, or the first component of some of them."""
    return ["", *sorted({key.split(".", 1)[0] + "." for key in checkpoint.tensors if "." in key})]


def _match(base: Checkpoint, name: str, member: Checkpoint, heads: Sequence[str], problems: list[str]) -> _Matched:
    """Finds each base weight in a member; a bare backbone and one inside a task model (`bert.…`) are the same."""
    own = {key for key, info in member.tensors.items() if not is_buffer(key, info.shape)}
    weights = [key for key, info in base.tensors.items() if not is_buffer(key, info.shape)]

    def overlap(pair: tuple[str, str]) -> int:
        ours, theirs = pair
        return sum(theirs + key[len(ours) :] in own for key in weights if key.startswith(ours))

    pairs = [("", "")] + [("", p) for p in _prefixes(member)[1:]] + [(p, "") for p in _prefixes(base)[1:]]
    ours, theirs = max(pairs, key=overlap)
    if overlap((ours, theirs)) * 2 < len(weights):
        problems.append(
            f"{name}: {member.architecture} shares {overlap((ours, theirs))} of the base's {len(weights)} weights "
            f"({base.architecture}): it is another model"
        )
        return _Matched(member, {}, list(own))
    names = {
        key: theirs + key[len(ours) :] for key in weights if key.startswith(ours) and theirs + key[len(ours) :] in own
    }
    names = {key: raw for key, raw in names.items() if not _is_head(raw, heads) and not _is_head(key, heads)}
    modules = {".".join(parts[:depth]) for parts in map(_split, names.values()) for depth in range(len(parts))}
    head = []
    for raw in own - set(names.values()):
        if _extends(raw, modules) and member.tensors[raw].dtype.is_floating_point and not _is_head(raw, heads):
            problems.append(f"{name}: '{raw}' is not in the base, though the rest of its module is")
        else:
            head.append(raw)
    small = _small_roots(member)
    for key, raw in list(names.items()):
        here, there = member.tensors[raw], base.tensors[key]
        if here.shape != there.shape:
            if raw.split(".", 1)[0] in small:
                head.append(raw)
                del names[key]
            else:
                problems.append(f"{name}: '{raw}' has shape {list(here.shape)}, the base has {list(there.shape)}")
        elif here.dtype.is_floating_point != there.dtype.is_floating_point:
            problems.append(f"{name}: '{raw}' is {here.dtype}, the base has {there.dtype}")
    return _Matched(member, names, head)


def _split(name: str) -> list[str]:
    return name.split(".")


def _extends(raw: str, modules: set[str]) -> bool:
    """Whether a tensor adds a layer or a parameter to a module that is merged, and not a module of its own."""
    parts = _split(raw)
    depth = max((d for d in range(1, len(parts)) if ".".join(parts[:d]) in modules), default=0)
    return depth > 0 and (parts[depth].isdigit() or depth == len(parts) - 1)


def _is_head(raw: str, heads: Sequence[str]) -> bool:
    return any(fnmatchcase(raw, pattern) for pattern in heads)


def _small_roots(checkpoint: Checkpoint) -> set[str]:
    """Top-level modules with under a twentieth of the bytes: where shapes differ in one of these, it is a task head."""
    sizes: Counter[str] = Counter()
    for key, info in checkpoint.tensors.items():
        sizes[key.split(".", 1)[0]] += info.nbytes
    return {root for root, nbytes in sizes.items() if nbytes * 20 < checkpoint.nbytes}


def _merged_names(base: Checkpoint, found: Mapping[str, _Matched], notes: list[str]) -> list[str]:
    """The floating-point names that base and members share; what some members keep as a head, all keep."""
    kept: set[str] = set()
    for member in found.values():
        heads = set(member.head)
        kept |= {key for key in base.tensors if key not in member.names and (key in heads)}
    merged = []
    for key, info in base.tensors.items():
        if not info.dtype.is_floating_point or key in kept or is_buffer(key, info.shape):
            continue
        if any(key in member.names for member in found.values()):
            merged.append(key)
        else:
            notes.append(f"'{key}' is only in the base, and is left as it is")
    for member in found.values():
        member.head += [member.names[key] for key in kept if key in member.names]
    return merged


def _label_problems(
    base: Checkpoint, first: tuple[str, list[str] | None], name: str, member: _Matched, merged: Sequence[str]
) -> list[str]:
    """Heads that would be merged though their rows are other classes in a member than in the first that names them."""
    (who, ours), theirs = first, _labels(member.checkpoint)
    if ours is None or theirs is None or ours == theirs:
        return []
    shared = {key: member.names[key] for key in merged if key in member.names}
    # one of the two may be a bare backbone, whose embeddings and layers have no root in common
    inside = _under_largest_root(base, shared) | _under_largest_root(base, {key: key for key in shared})
    rows = [
        key
        for key in shared
        if base.tensors[key].shape[:1] == (len(ours),)
        and key.endswith((".weight", ".bias"))
        and key not in inside
        and "embed" not in key
    ]
    if not rows:
        return []
    what = "in another order" if sorted(ours) == sorted(theirs) else "others"
    return [
        f"{name}: the classes of its head are {what} (id2label {theirs}, {who} {ours}), so that '{rows[0]}' has other rows: "
        f"keep heads per task with `heads: ['{rows[0].rpartition('.')[0]}.*']`, or save it with the same order"
    ]


def _under_largest_root(base: Checkpoint, names: Mapping[str, str]) -> set[str]:
    """Of weights by their own or another name, those in the top-level module with most bytes: the backbone."""
    sizes: Counter[str] = Counter()
    for key, name in names.items():
        sizes[name.split(".", 1)[0]] += base.tensors[key].nbytes
    largest = max(sizes, key=lambda root: sizes[root], default="")
    return {key for key, name in names.items() if name.split(".", 1)[0] == largest}


def _labels(checkpoint: Checkpoint) -> list[str] | None:
    """The names of a head's classes in order; None where the configuration has none but transformers' own."""
    found = checkpoint.config.get("id2label")
    if not isinstance(found, Mapping) or not all(str(key).isdigit() for key in found):
        return None
    names = [str(found[key]) for key in sorted(found, key=int)]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _left_out(member: Member, base: Checkpoint, heads: Sequence[str]) -> list[str]:
    """Notes on a member's tensors that reach no merged checkpoint, though nobody named them as a head."""
    mine = [key for key in member.head if not _is_head(key, heads)]
    buffers = [
        key for key, info in member.checkpoint.tensors.items() if is_buffer(key, info.shape) and key not in base.tensors
    ]
    notes = []
    if mine:
        notes.append(
            f"{member.name}: not merged, and in no merged checkpoint, but kept as its task's head: {_listed(mine)}"
        )
    if buffers:
        notes.append(f"{member.name}: no parameters, and left out: {_listed(buffers)}")
    return notes


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first of them where there are many."""
    shown = ", ".join(f"'{name}'" for name in names[:MAX_REPORTED])
    return shown if len(names) <= MAX_REPORTED else f"{shown} and {len(names) - MAX_REPORTED} more"


def _absent(base: Checkpoint, found: Mapping[str, _Matched], merged: Sequence[str]) -> list[str]:
    """Weights that some members have and others lack; a module that one lacks altogether can stay out of the merge."""
    problems = []
    for name, member in found.items():
        lacking = [key for key in merged if key not in member.names] if member.names else []
        present = {key.rpartition(".")[0].split(".", 1)[0] for key in member.names}
        for key in lacking:
            module = key.split(".", 1)[0]
            remedy = f": keep it per task with `heads: ['{module}.*']`" if module not in present else ""
            problems.append(
                f"{name}: has no '{key}' {list(base.tensors[key].shape)}, which base and other members have{remedy}"
            )
    return problems
