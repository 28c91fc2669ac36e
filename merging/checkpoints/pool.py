"""A base checkpoint and the members fine-tuned from it, compared before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import Tensor

from merging.checkpoints.adapters.adapter import open_checkpoint
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.formats.buffers import is_buffer
from merging.checkpoints.formats.configuration import differences, function_of
from merging.checkpoints.formats.safetensors_file import TensorInfo
from merging.checkpoints.layout import transposed_weights
from merging.checkpoints.matching import absent, is_head, label_problems, match, merged_names
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
        matched = {}
        for name, checkpoint in opened.items():
            problems += _config_problems(origin, name, checkpoint)
            matched[name] = match(origin, name, checkpoint, heads, problems)
        merged = merged_names(origin, matched, notes)
        problems += absent(origin, matched, merged)
        problems += label_problems(origin, matched, merged)
        for name, member in matched.items():
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
            for name, member in matched.items()
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


def _config_problems(base: Checkpoint, name: str, member: Checkpoint) -> list[str]:
    """Fields in which a member's configuration makes another function of the same weights than the base's."""
    return [
        f"{name}: config.json has {field} = {theirs!r}, the base has {ours!r}"
        for field, ours, theirs in differences(base.config, member.config)
    ]


def _left_out(member: Member, base: Checkpoint, heads: Sequence[str]) -> list[str]:
    """Notes on a member's tensors that reach no merged checkpoint, though nobody named them as a head."""
    mine = [key for key in member.head if not is_head(key, heads)]
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
