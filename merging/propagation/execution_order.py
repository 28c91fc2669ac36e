"""In which order a model's linear layers run, which share an input, and which add to a residual stream."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from merging.propagation.paused_forward import HookPoint
from merging.propagation.residual import Sights
from merging.propagation.used_positions import UsedPositions, used_rows
from merging.statistics.capture.hooks import differentiable
from merging.statistics.capture.layers import decoder_layers, decoder_mask
from merging.statistics.capture.verification import probe_gradient
from merging.tasks.task import Batch, Task


@dataclass(frozen=True)
class Call:
    """A linear layer that runs once in a forward pass.

    Args:
        path: Its name in the model.
        order: Rank among all that happens in the pass.
        source: `order` of the first layer that reads the same input tensor.
        rows: Which rows of it count.
        decoding: Whether it runs at the positions of an encoder–decoder's decoder.
        residual: Where the tensor passes that its output is added to, where there is one.
    """

    path: str
    order: int
    source: int
    rows: UsedPositions
    decoding: bool
    residual: HookPoint | None


def trace(model: nn.Module, task: Task, layers: Mapping[str, str], batch: Batch) -> dict[str, Call]:
    """Runs a model on a few examples, forward and backward, and watches its layers.

    Args:
        model: The model, on the device of the batch.
        task: Gives the logits.
        layers: Path of each layer of interest → the name of its weight.
        batch: A few examples of differing lengths.

    Returns:
        By the weight's name, the layers that run, in the order in which they do; without those that run twice, whose
        inputs are never known before their own outputs.
    """
    tracer = _Tracer(model, layers)
    try:
        with differentiable(model, parameters=True):
            logits = task.logits(model, batch)
            gradients = _gradients(logits, tracer.edges)
    finally:
        tracer.close()
    modules = {model.get_submodule(path): name for path, name in layers.items()}
    decoding = decoder_layers(model, task.logits, modules, batch)
    calls = {}
    for path, orders in tracer.orders.items():
        if len(orders) > 1:
            continue
        late = model.get_submodule(path) in decoding
        mask = decoder_mask(batch) if late else batch.mask
        source = tracer.sources[path]
        calls[layers[path]] = Call(
            path, orders[0], source, used_rows(gradients[path], mask), late, tracer.sights.residual(path, source)
        )
    return calls


def _gradients(logits: Tensor, edges: Mapping[str, GradientEdge]) -> dict[str, Tensor | None]:
    """The gradient of a sum over all logits, each with a weight of its own, for each layer's output."""
    if not logits.requires_grad:
        return dict.fromkeys(edges)
    gradients = torch.autograd.grad(logits, list(edges.values()), probe_gradient(logits), allow_unused=True)
    return dict(zip(edges, gradients, strict=True))


class _Tracer:
    """Hooks on every module of a model."""

    def __init__(self, model: nn.Module, layers: Mapping[str, str]) -> None:
        self.sights = Sights()
        self.orders: dict[str, list[int]] = {}
        self.sources: dict[str, int] = {}
        self.edges: dict[str, GradientEdge] = {}
        self._inputs: dict[int, tuple[Tensor, int]] = {}
        self._handles = []
        for path, module in model.named_modules():
            watched = path in layers
            self._handles += [
                module.register_forward_pre_hook(self._before(path, watched), with_kwargs=True),
                module.register_forward_hook(self._after(path, watched)),
            ]

    def close(self) -> None:
        """Removes the hooks."""
        self._inputs.clear()
        for handle in self._handles:
            handle.remove()

    def _before(self, path: str, watched: bool) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            order = self.sights.add(path, (args, kwargs), output=False)
            if watched:
                # The tensor is kept beside its order, so that its id is not given to another within the pass.
                _, first = self._inputs.setdefault(id(args[0]), (args[0], order))
                self.orders.setdefault(path, []).append(order)
                self.sources[path] = first

        return see

    def _after(self, path: str, watched: bool) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            self.sights.add(path, output, output=True)
            if watched and output.requires_grad:
                self.edges[path] = get_gradient_edge(output)

        return see
