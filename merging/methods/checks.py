"""What every method asks of its input before it starts: members that fit, statistics that can be right."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.gram_sketch import extents
from merging.methods.method import Weight
from merging.recipe import BASE
from merging.registry import did_you_mean


def check_weights(weights: Sequence[Weight]) -> tuple[str, ...]:
    """Looks at shapes, dtypes and members.

    Returns:
        The names of the members, sorted; all weights have the same.

    Raises:
        MethodError: A weight lacks a member that another has, has another shape than the base, or holds no
            floating-point numbers.
    """
    if not weights:
        return ()
    expected = tuple(sorted(weights[0].members))
    for weight in weights:
        if missing := set(expected) ^ set(weight.members):
            raise MethodError(
                f"'{weight.name}': only some weights have member '{min(missing)}'. Leave the member out, or "
                "give all its weights"
            )
        for member, value in {BASE: weight.base, **weight.members}.items():
            if value.shape != weight.base.shape:
                raise MethodError(
                    f"{member}: '{weight.name}' has shape {list(value.shape)}, the base has "
                    f"{list(weight.base.shape)}: it was not fine-tuned from this base"
                )
            if not value.dtype.is_floating_point:
                raise MethodError(
                    f"{member}: '{weight.name}' is {value.dtype}; take it from the base instead of merging it"
                )
    return expected


def chosen(scaling: Mapping[str, float], members: Sequence[str]) -> tuple[str, ...]:
    """The members that take part, sorted: every sum runs in this order, whatever the order of a recipe.

    Raises:
        MethodError: None takes part, or one was not prepared.
    """
    if not scaling:
        raise MethodError("a merge needs at least one member")
    for member in scaling:
        if member not in members:
            raise MethodError(f"member '{member}' is not in the pool. {did_you_mean(member, list(members))}")
    return tuple(sorted(scaling))


def example_counts(examples: Mapping[str, int], members: Sequence[str]) -> dict[str, int]:
    """Each member's number of training examples s_t; 1 where no member's is known.

    Raises:
        MethodError: Only some members' are known.
    """
    unknown = [member for member in members if member not in examples]
    if unknown and len(unknown) < len(members):
        raise MethodError(
            f"number of training examples unknown for {', '.join(unknown)}, though it is given for other "
            "members: give all of them, or none"
        )
    return {member: examples.get(member, 1) for member in members}


def statistic(
    weight: Weight, kind: str, shape: Sequence[int], *, nonnegative: bool, base: bool = False
) -> dict[str, Tensor]:
    """A weight's statistic of every member, checked; empty where the kind has nothing for this weight.

    Args:
        weight: Whose.
        kind: `fisher`, `gram`, …
        shape: What each member's must be, or, of a Gram, what its sketch must stand for.
        nonnegative: Refuse negative entries.
        base: Give the base's too, where it is there.

    Raises:
        MethodError: A member lacks it, or its is of another shape, negative, NaN or Inf.
    """
    own = weight.statistics.get(kind, {})
    if not any(member in own for member in weight.members):
        return {}
    remedy = f"Compute the {kind} statistic of this member again, or leave the member out"
    values = {}
    for member in [*sorted(weight.members), *([BASE] if base and BASE in own else [])]:
        if member not in own:
            raise MethodError(f"{member}: no {kind} for '{weight.name}', which other members have. {remedy}")
        value = own[member]
        given = extents(value.shape) if kind == "gram" and value.dim() > 1 else value.shape
        if list(given) != list(shape):
            raise MethodError(
                f"{member}: {kind} of '{weight.name}' has shape {list(value.shape)}, not {list(shape)}: it "
                f"belongs to another model. {remedy}"
            )
        low, high = (bound.item() for bound in torch.aminmax(value)) if value.numel() else (0.0, 0.0)
        if not abs(low) + abs(high) < float("inf"):
            raise MethodError(f"{member}: {kind} of '{weight.name}' holds NaN or Inf. {remedy}")
        if nonnegative and low < 0:
            raise MethodError(f"{member}: {kind} of '{weight.name}' has negative entries ({low:g}). {remedy}")
        values[member] = value
    return values


def target(out: Mapping[str, Tensor], weight: Weight) -> Tensor:
    """The tensor to overwrite for a weight.

    Raises:
        MethodError: It is missing, or of another shape.
    """
    if weight.name not in out:
        raise MethodError(f"there is no weight '{weight.name}' to write to: the model is not the pool's")
    value = out[weight.name]
    if value.shape != weight.base.shape:
        raise MethodError(
            f"'{weight.name}' to write to has shape {list(value.shape)}, the pool's has {list(weight.base.shape)}"
        )
    return value
