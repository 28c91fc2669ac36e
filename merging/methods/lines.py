"""LiNeS: task arithmetic whose scale grows linearly from the first layer to the last."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights, chosen
from merging.recipe import Value


def layer(name: str) -> int | None:
    """The first number that is a whole component of a weight's name: `encoder.layer.3.output…` is of layer 3."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


@register
class Lines(Method):
    """θ_0 + Σ α_t (a + b l / (L − 1)) τ_t, l the weight's layer of L (Wang et al. 2024, LiNeS).

    Embeddings have l = 0; other weights outside the layers come after them and have l = L − 1.
    """

    name = "lines"
    summary = "task arithmetic with a scale that grows with depth"
    scaling = Parameter(1.0, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "a": Parameter(0.2, "scale of the first layer", low=0.0, high=1.0),
        "b": Parameter(0.4, "how much larger the last layer's is", low=0.0, high=1.0),
    }

    def survey(self, weights: Iterable[Weight]) -> int:
        """Number of layers seen."""
        return max((number + 1 for weight in weights if (number := layer(weight.name)) is not None), default=1)

    def combine(self, first: int | None, second: int | None) -> int:
        """The larger number."""
        return max(first or 1, second or 1)

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, in their stored dtype."""
        return PreparedLines(weights, self.survey(weights) if context.survey is None else context.survey)


class PreparedLines(Prepared):
    """Base and members as they are stored.

    Args:
        weights: The weights to merge.
        layers: Number of layers of the whole model.
    """

    def __init__(self, weights: Sequence[Weight], layers: int) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._layers = layers
        self._scratch = Scratch()

    def _depth(self, weight: Weight) -> float:
        """Where the weight is: l / (L − 1), from 0 to 1."""
        number = layer(weight.name)
        if number is None:
            return 0.0 if "embed" in weight.name else 1.0
        return number / max(self._layers - 1, 1)

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and members."""
        members = chosen(scaling, self._members)
        for weight in self._weights:
            grown = float(parameters["a"]) + float(parameters["b"]) * self._depth(weight)
            factors = [scaling[member] * grown for member in members]
            values = [weight.members[member] for member in members]
            terms = [(weight.base, 1.0 - sum(factors)), *zip(values, factors, strict=True)]
            weighted_sum(terms, target(out, weight), self._scratch)
