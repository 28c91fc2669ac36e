"""Which of a member's tensors is which weight of the base: what is merged, what is a task's head, and what does not fit."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.formats.buffers import is_buffer


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


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    """What may stand before a backbone's names: nothing, or the first component of some of them."""
    return ["", *sorted({key.split(".", 1)[0] + "." for key in checkpoint.tensors if "." in key})]


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

    def overlap(pair: tuple[str, str]) -> int:
        ours, theirs = pair
        return sum(theirs + key[len(ours) :] in own for key in weights if key.startswith(ours))

    pairs = [("", "")] + [("", p) for p in _prefixes(member)[1:]] + [(p, "") for p in _prefixes(base)[1:]]
    ours, theirs = max(pairs, key=overlap)
    if (shared := overlap((ours, theirs))) * 2 < len(weights):
        problems.append(
            f"{name}: {member.architecture} shares {shared} of the base's {len(weights)} weights "
            f"({base.architecture}): it is another model"
        )
        return Matched(member, {}, list(own))
    names = {
        key: theirs + key[len(ours) :] for key in weights if key.startswith(ours) and theirs + key[len(ours) :] in own
    }
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
