"""LiNeS: any method, with what it adds to the base scaled linearly from the first layer to the last."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch, spans
from merging.methods.averaging.task_arithmetic import TaskArithmetic
from merging.methods.depth import depth
from merging.methods.method import METHODS, Context, Method, Parameter, Prepared, Weight, modifier, register
from merging.methods.modified import Modified, PreparedModified, modify
from merging.recipe import Value


@register
class Lines(Modified):
    """θ_0 + Σ α_t (a + b l / (L − 1)) τ_t, l the weight's layer of L (Wang et al. 2024, LiNeS).

    Embeddings have l = 0; other weights outside the layers come after them and have l = L − 1. `lines+METHOD` is any other
    method θ_0 + Δ as θ_0 + (a + b l / (L − 1)) Δ, with that method's scaling factors and parameters besides.
    """

    name = "lines"
    summary = "task arithmetic with a scale that grows with depth"
    elementwise = True
    scaling = Parameter(1.0, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "a": Parameter(0.2, "scale of the first layer", low=0.0, high=1.0),
        "b": Parameter(0.4, "how much larger the last layer's is", low=0.0, high=1.0),
    }
    inner: ClassVar[Method] = METHODS[TaskArithmetic.name]

    def global_pass(self, weights: Iterable[Weight]) -> tuple[int, Any]:
        """Number of layers seen, and the global statistics of the method that is scaled."""
        return self._seen(weights, self.inner.global_pass)

    def sample(self, weights: Iterable[Weight], parameters: Mapping[str, Value]) -> tuple[int, Any]:
        """Number of layers seen, and the sample of the method that is scaled."""
        return self._seen(weights, lambda rest: self.inner.sample(rest, parameters))

    def _seen(self, weights: Iterable[Weight], look: Callable[[Iterable[Weight]], Any]) -> tuple[int, Any]:
        layers = 1

        def counted() -> Iterator[Weight]:
            nonlocal layers
            for weight in weights:
                number = depth(weight.name)
                layers = max(layers, int(number) + 1 if number < inf else 1)
                yield weight

        rest = counted()
        inner = look(rest)
        for _ in rest:  # a method that needs no global pass has left them all
            pass
        return layers, inner

    def combine(self, first: tuple[int, Any] | None, second: tuple[int, Any] | None) -> tuple[int, Any]:
        """The larger number; both of the inner global statistics."""
        (one, some), (other, more) = first or (1, None), second or (1, None)
        return max(one, other), self.inner.combine(some, more)

    def second_pass(
        self, weights: Iterable[Weight], global_stats: tuple[int, Any], parameters: Mapping[str, Value]
    ) -> tuple[int, Any] | None:
        """More of the inner global statistics."""
        layers, inner = global_stats
        more = self.inner.second_pass(weights, inner, parameters)
        return None if more is None else (layers, more)

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """What the method that is scaled prepares."""
        layers, inner = self.global_pass(weights) if context.global_stats is None else context.global_stats
        prepared = self.inner.prepare(weights, replace(context, global_stats=inner))
        return PreparedLines(weights, prepared, layers)


@modifier("lines")
def lines(inner: Method) -> Method:
    """A method whose step from the base grows with depth; unchanged in the last layer at its defaults.

    Raises:
        MethodError: The method has parameters of these names already (it grows with depth by itself).
    """
    if inner.parameters.keys() & Lines.parameters.keys():
        raise MethodError(f"'{inner.name}' scales by depth already: leave out 'lines+'")
    own = {name: replace(spec, default=0.5) for name, spec in Lines.parameters.items()}
    return modify(Lines, "lines", inner, f"{inner.summary}, growing with depth", own)


class PreparedLines(PreparedModified):
    """A method's state, and how deep each weight lies.

    Args:
        weights: The weights to merge.
        prepared: The state of the method that is scaled.
        layers: Number of layers of the whole model.
    """

    def __init__(self, weights: Sequence[Weight], prepared: Prepared, layers: int) -> None:
        super().__init__(weights, prepared)
        self._layers = layers

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Merges, then scales in place."""
        staged = self.staged(out)
        self.prepared.merge(scaling, parameters, staged)
        for weight in self.weights:
            scale = float(parameters["a"]) + float(parameters["b"]) * self._depth(weight)
            if scale != 1:
                _scale_step(weight.base, staged[weight.name], scale, self.scratch)
        self.write(staged, out)

    def _depth(self, weight: Weight) -> float:
        """Where the weight is: l / (L − 1), from 0 to 1."""
        return min(depth(weight.name) / max(self._layers - 1, 1), 1.0)


def _scale_step(base: Tensor, merged: Tensor, scale: float, scratch: Scratch) -> None:
    """Overwrites the float32 θ with θ_0 + s (θ − θ_0)."""
    before, after = base.reshape(-1), merged.view(-1)
    for start, stop in spans(after.numel(), after.device, rows=2):
        row = before[start:stop]
        if row.dtype != torch.float32:
            row = scratch.take("base", stop - start, device=after.device).copy_(row)
        torch.lerp(row, after[start:stop], scale, out=after[start:stop])
