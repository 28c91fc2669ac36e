"""Weights that are several matrices: convolutions, whose groups are matrices each, and joined experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from merging.errors import MethodError
from merging.kernels.gram_sketch import extents
from merging.methods.checks import check_weights, target
from merging.methods.method import Prepared, Weight
from merging.recipe import Value

SIDES = {"gram": 1, "output_gram": 0}
"""Statistics that are matrices of one side of a weight: 1 of what it reads, 0 of what it puts out."""


def blocks_of(weight: Weight) -> list[Weight]:
    """A weight that has Grams as the matrices that these belong to, as views; any other as it is.

    A convolution [out, in / groups, …] is a matrix [out / groups, in / groups · kernel] for each group, its Gram
    [groups, in, in], or [in, in] of one. Experts [E, out, in], or [E, in, out] where the weight is `transposed`, are E
    matrices, their Gram [E, in, in].

    Raises:
        MethodError: The Grams are of another weight.
    """
    grams = [(kind, value) for kind in SIDES for value in weight.statistics.get(kind, {}).values()]
    if not grams or (weight.base.dim() == 2 and all(value.dim() == 2 for _, value in grams)):
        return [weight]
    counts = {value.shape[0] if value.dim() == 3 else 1 for _, value in grams}
    count = counts.pop()
    shape = weight.base.shape
    if counts or len(shape) < 2 or shape[0] % count:
        raise _misfit(weight, grams[0])
    is_experts = len(shape) == 3 and count == shape[0]
    rows, columns = shape[1:] if is_experts else (shape[0] // count, shape[1:].numel())
    sides = (columns, rows) if weight.transposed else (rows, columns)
    for kind, value in grams:
        given = extents(value.shape) if kind == "gram" else tuple(value.shape)
        if given[-2:] != (sides[SIDES[kind]],) * 2:
            raise _misfit(weight, (kind, value))

    def parts(value: Tensor) -> Tensor:
        return value.reshape(count, rows, columns)

    base, members = parts(weight.base), {member: parts(value) for member, value in weight.members.items()}
    views = []
    for place in range(count):
        statistics = {
            kind: {
                who: (value[place] if value.dim() == 3 else value) if kind in SIDES else parts(value)[place]
                for who, value in values.items()
            }
            for kind, values in weight.statistics.items()
        }
        views.append(
            replace(
                weight,
                name=weight.name if count == 1 else f"{weight.name}[{place}]",
                base=base[place],
                members={member: value[place] for member, value in members.items()},
                statistics=statistics,
            )
        )
    return views


class InBlocks(Prepared):
    """A method for matrices, on weights that may be several.

    Args:
        weights: The weights to merge.
        prepare: The method's state for their matrices.
    """

    def __init__(self, weights: Sequence[Weight], prepare: Callable[[Sequence[Weight]], Prepared]) -> None:
        check_weights(weights)
        self._views = [(weight, blocks_of(weight)) for weight in weights]
        self._inner = prepare([view for _, views in self._views for view in views])

    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Each matrix is written where it lies."""
        written: dict[str, Tensor] = {}
        copied: list[tuple[Tensor, Tensor]] = []
        for weight, views in self._views:
            whole = target(out, weight)
            if views[0] is weight:
                written[weight.name] = whole
                continue
            place = whole if whole.is_contiguous() else whole.contiguous()
            if place is not whole:
                copied.append((whole, place))
            parts = place.view(len(views), *views[0].base.shape)
            written.update({view.name: part for view, part in zip(views, parts, strict=True)})
        self._inner.merge(scaling, parameters, written)
        for whole, place in copied:
            whole.copy_(place)

    def report(self) -> dict[str, float]:
        """The method's own."""
        return self._inner.report()


def _misfit(weight: Weight, gram: tuple[str, Tensor]) -> MethodError:
    kind, value = gram
    return MethodError(
        f"'{weight.name}' has shape {list(weight.base.shape)}, and its {kind} {list(value.shape)}: it belongs to another "
        f"model. Compute the {kind} again"
    )
