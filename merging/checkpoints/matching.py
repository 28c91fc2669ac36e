"""Which of a member's tensors is which weight of the base: what is merged, what is a task's head, and what does not fit."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.formats.buffers import is_buffer
from merging.checkpoints.models.skeleton import build, live_names
from merging.errors import CheckpointError


@dataclass
class Matched:
    """What a member's names were found to mean.

    Args:
        checkpoint: The member.
        names: The base's name of every weight that it has → its own.
        head: Its names of the tensors that are kept for its task.
    """

    checkpoint: Checkpoint
    names: dict[str, str]
    head: list[str]

    def head_in_file_order(self) -> tuple[str, ...]:
        """`head`, as the checkpoint has it."""
        kept = set(self.head)
        return tuple(key for key in self.checkpoint.tensors if key in kept)


def _prefixes(names: Iterable[str]) -> list[str]:
    """What may stand before a backbone's names: nothing, or the first component of some of them."""
    return ["", *sorted({key.split(".", 1)[0] + "." for key in names if "." in key})]


def match(base: Checkpoint, name: str, member: Checkpoint, heads: Sequence[str], problems: list[str]) -> Matched:
    """Finds each base weight in a member; a bare backbone and one inside a task model (`bert.…`) are the same.

    Args:
        base: The base.
        name: The member's name, for messages.
        member: The member.
        heads: Patterns of names to keep per task.
        problems: What does not fit is added.
    """
    own = {key for key, info in member.tensors.items() if not is_buffer(key, info.shape)}
    weights = [key for key, info in base.tensors.items() if not is_buffer(key, info.shape)]

    names = _same_names({key: key for key in weights}, {key: key for key in own})
    left, extra = [key for key in weights if key not in names], own - set(names.values())
    if left and extra and _may_be_the_same(base, left, member, extra):
        names = _names_as_loaded(base, weights, name, member, own, names, problems)
    if len(names) * 2 < len(weights):
        problems.append(
            f"{name}: {member.architecture} shares {len(names)} of the base's {len(weights)} weights "
            f"({base.architecture}): it is another model"
        )
        return Matched(member, {}, list(own))
    names = {key: raw for key, raw in names.items() if not is_head(raw, heads) and not is_head(key, heads)}
    modules = {".".join(parts[:depth]) for parts in map(_split, names.values()) for depth in range(len(parts))}
    head = []
    for raw in own - set(names.values()):
        if _extends(raw, modules) and member.tensors[raw].dtype.is_floating_point and not is_head(raw, heads):
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
    return Matched(member, names, head)


def _same_names(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """The base's stored name → the member's, of weights of one name, but for what stands before a backbone's.

    Args:
        ours: A name of each of the base's weights → its name in the file.
        theirs: The same of the member.
    """

    def paired(before: str, instead: str) -> dict[str, str]:
        pairs = ((raw, instead + key[len(before) :]) for key, raw in ours.items() if key.startswith(before))
        return {raw: theirs[key] for raw, key in pairs if key in theirs}

    swaps = [("", prefix) for prefix in _prefixes(theirs)] + [(prefix, "") for prefix in _prefixes(ours)[1:]]
    return max((paired(*swap) for swap in swaps), key=len)


def _may_be_the_same(base: Checkpoint, left: Sequence[str], member: Checkpoint, extra: Iterable[str]) -> bool:
    """Whether weights that only one of the two has may be the same under other names, and not heads: transformers knows."""
    if base.architecture == member.architecture:
        return True
    shapes = {base.tensors[key].shape for key in left}
    others = [member.tensors[key] for key in extra]
    return any(info.shape in shapes for info in others) or sum(info.nbytes for info in others) * 20 > member.nbytes


def _names_as_loaded(
    base: Checkpoint,
    weights: Sequence[str],
    name: str,
    member: Checkpoint,
    own: set[str],
    names: dict[str, str],
    problems: list[str],
) -> dict[str, str]:
    """As `_same_names`, by the names under which transformers loads both: versions of it saved other names (`gamma`).

    Args:
        base: The base.
        weights: Its weights.
        name: The member's name, for messages.
        member: The member.
        own: Its weights.
        names: What was found by the names as they are stored; given back where transformers does not know better.
        problems: What is one weight in the model, and stored as other parts, is added.
    """
    ours, theirs = _loaded_names(base, weights), _loaded_names(member, own)
    alone, others = _alone(ours), _alone(theirs)
    better = _same_names(
        {alone.get(key, key): key for key in weights}, {others.get(raw, raw): raw for raw in sorted(own)}
    )
    names = better if len(better) > len(names) else names
    parts = {theirs[raw]: raw for raw in sorted(own - set(names.values()), reverse=True) if raw in theirs}
    for key in weights:
        if key not in names and (raw := parts.get(ours.get(key, ""))):
            problems.append(
                f"{name}: stores as '{raw}' what the base stores as '{key}', in other parts: save both by one version of "
                f"transformers (`{member.architecture}.from_pretrained(DIR).save_pretrained(NEW)`)"
            )
            break
    return names


def _loaded_names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Name in the file → name in the model, of all that transformers loads; nothing where it has no such model."""
    return _of_configuration(
        json.dumps(checkpoint.config, sort_keys=True), checkpoint.architecture, tuple(sorted(names))
    )


@lru_cache(maxsize=4)  # members of a pool are mostly of one configuration and the same names
def _of_configuration(config: str, architecture: str, names: tuple[str, ...]) -> dict[str, str]:
    try:
        return live_names(build("config.json", json.loads(config), architecture), names)
    except CheckpointError:
        return {}


def _alone(loaded: Mapping[str, str]) -> dict[str, str]:
    """Of names in files and in the model, those that have their name in the model alone."""
    counts = Counter(loaded.values())
    return {raw: target for raw, target in loaded.items() if counts[target] == 1}


def _split(name: str) -> list[str]:
    return name.split(".")


def _extends(raw: str, modules: set[str]) -> bool:
    """Whether a tensor adds a layer or a parameter to a module that is merged, and not a module of its own."""
    parts = _split(raw)
    depth = max((d for d in range(1, len(parts)) if ".".join(parts[:d]) in modules), default=0)
    return depth > 0 and (parts[depth].isdigit() or depth == len(parts) - 1)


def is_head(raw: str, heads: Sequence[str]) -> bool:
    """Whether a user's patterns keep a tensor of this name per task."""
    return any(fnmatchcase(raw, pattern) for pattern in heads)


def _small_roots(checkpoint: Checkpoint) -> set[str]:
    """Top-level modules with under a twentieth of the bytes: where shapes differ in one of these, it is a task head."""
    sizes: Counter[str] = Counter()
    for key, info in checkpoint.tensors.items():
        sizes[key.split(".", 1)[0]] += info.nbytes
    return {root for root, nbytes in sizes.items() if nbytes * 20 < checkpoint.nbytes}


def merged_names(base: Checkpoint, matched: Mapping[str, Matched], notes: list[str]) -> list[str]:
    """The floating-point names that base and members share; what some members keep as a head, all keep.

    Args:
        base: The base.
        matched: The members; what they keep now is added to their heads.
        notes: What only the base has is added.

    Returns:
        The base's names, in its order.
    """
    kept: set[str] = set()
    for member in matched.values():
        heads = set(member.head)
        kept |= {key for key in base.tensors if key not in member.names and key in heads}
    merged = []
    for key, info in base.tensors.items():
        if not info.dtype.is_floating_point or key in kept or is_buffer(key, info.shape):
            continue
        if any(key in member.names for member in matched.values()):
            merged.append(key)
        else:
            notes.append(f"'{key}' is only in the base, and is left as it is")
    for member in matched.values():
        member.head += [member.names[key] for key in kept if key in member.names]
    return merged


def label_problems(base: Checkpoint, matched: Mapping[str, Matched], merged: Sequence[str]) -> list[str]:
    """Heads that would be merged though their rows are other classes in a member than in the first that names them."""
    labels = {"the base": _class_names(base)} | {
        f"'{name}'": _class_names(one.checkpoint) for name, one in matched.items()
    }
    first = next(((who, names) for who, names in labels.items() if names is not None), None)
    if first is None:
        return []
    problems = (_label_problem(base, *first, name, member, merged) for name, member in matched.items())
    return [problem for problem in problems if problem is not None]


def _label_problem(
    base: Checkpoint, who: str, ours: Sequence[str], name: str, member: Matched, merged: Sequence[str]
) -> str | None:
    """What is wrong with a member's head, whose classes are `ours` in the first that names them."""
    theirs = _class_names(member.checkpoint)
    if theirs is None or ours == theirs:
        return None
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
        return None
    what = "in another order" if sorted(ours) == sorted(theirs) else "others"
    return (
        f"{name}: the classes of its head are {what} (id2label {theirs}, {who} {ours}), so that '{rows[0]}' has other rows: "
        f"keep heads per task with `heads: ['{rows[0].rpartition('.')[0]}.*']`, or save it with the same order"
    )


def _under_largest_root(base: Checkpoint, names: Mapping[str, str]) -> set[str]:
    """Of weights by their own or another name, those in the top-level module with most bytes: the backbone."""
    sizes: Counter[str] = Counter()
    for key, name in names.items():
        sizes[name.split(".", 1)[0]] += base.tensors[key].nbytes
    largest = max(sizes, key=lambda root: sizes[root], default="")
    return {key for key, name in names.items() if name.split(".", 1)[0] == largest}


def _class_names(checkpoint: Checkpoint) -> list[str] | None:
    """The names of a head's classes in order; None where the configuration has none but transformers' own."""
    labels = checkpoint.config.get("id2label")
    if not isinstance(labels, Mapping) or not all(str(key).isdigit() for key in labels):
        return None
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def absent(base: Checkpoint, matched: Mapping[str, Matched], merged: Sequence[str]) -> list[str]:
    """Weights that some members have and others lack; a module that one lacks altogether can stay out of the merge."""
    problems = []
    for name, member in matched.items():
        lacking = [key for key in merged if key not in member.names] if member.names else []
        present = {key.rpartition(".")[0].split(".", 1)[0] for key in member.names}
        for key in lacking:
            module = key.split(".", 1)[0]
            remedy = f": keep it per task with `heads: ['{module}.*']`" if module not in present else ""
            problems.append(
                f"{name}: has no '{key}' {list(base.tensors[key].shape)}, which base and other members have{remedy}"
            )
    return problems
