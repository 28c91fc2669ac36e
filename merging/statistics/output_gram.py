"""Gram matrices of the gradients at linear layers' outputs: K-FAC's B_t."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from merging.statistics.capture.hooks import differentiable, tap
from merging.statistics.capture.layers import (
    decoder_layers,
    device_of,
    layer_names,
    means,
    transposed_names,
    uncovered,
)
from merging.statistics.capture.linear_calls import LinearCalls, UnaccountableRowsError, inspect_calls, real_mask
from merging.statistics.capture.single_examples import single_examples
from merging.statistics.gram_sums import GramSums
from merging.statistics.likelihood import LikelihoodSettings, objectives, settings_key
from merging.statistics.statistic import Partial, Statistic, StatisticSettings, register
from merging.tasks.task import Batch, Task


class OutputGramSettings(LikelihoodSettings):
    """Settings of output Grams."""

    largest: int = Field(
        16384,
        ge=1,
        description="Layers with more outputs than this (a vocabulary's) are left out: theirs is [out, out].",
    )


@register
class OutputGram(Statistic):
    """B = (1/tokens) Σ g gᵀ [out, out] for every linear layer's weight, g the gradient of log p(c|x) there.

    The sum is over real tokens and, weighted by p(c|x), over classes; what is drawn or observed, for the other
    estimators. With the Gram A of the layer's input, A ⊗ B stands for its block of the Fisher (MaTS, K-FAC).
    """

    kind: ClassVar[str] = "output_gram"
    version: ClassVar[int] = 3
    settings_type: ClassVar[type[StatisticSettings]] = OutputGramSettings
    settings: OutputGramSettings

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """One forward pass a batch, and a backward pass for every class but one (`exact`), or one.

        Of an example instead of a batch where single examples' rows cannot be told in a batch. Of the first batch two
        examples run twice more, and once backward, to find that out.

        Raises:
            StatisticsError: The estimator does not fit the task.
        """
        read = list(batches)
        try:
            return self._measure(model, task, read, alone=False)
        except UnaccountableRowsError:
            return self._measure(model, task, read, alone=True)

    def _measure(self, model: nn.Module, task: Task, batches: Iterable[Batch], *, alone: bool) -> Partial:
        layers = layer_names(model)
        sums = GramSums()
        edges: list[tuple[nn.Module, GradientEdge]] = []
        calls: LinearCalls | None = None
        decoding: set[nn.Module] = set()
        likelihood = task.likelihood(model)

        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if output.shape[-1] > self.settings.largest:
                return None
            tapped: Tensor
            tapped, found = tap(output, len(output))
            edges.extend((layer, edge) for edge in found if edge is not None)
            # What follows may change its input in place, and would lose the edge.
            return tapped.clone() if tapped is output else tapped

        with ExitStack() as restore:
            restore.enter_context(differentiable(model, parameters=False))
            for batch in batches:
                batch = batch.to(device_of(model))
                if calls is None:
                    decoding = decoder_layers(model, task.logits, layers, batch)
                    calls = inspect_calls(model, task.logits, layers, decoding, batch)
                    layers = {layer: name for layer, name in layers.items() if name not in calls.incomplete}
                    for layer in layers:
                        restore.callback(layer.register_forward_hook(hook).remove)
                for part in single_examples(batch, unpadded=True) if alone or calls.alone else (batch,):
                    edges.clear()
                    todo = objectives(task.logits(model, part), part, self.settings, likelihood)
                    places = [edge for _, edge in edges]
                    for number, objective in enumerate(todo, start=1):
                        found = torch.autograd.grad(
                            objective, places, retain_graph=number < len(todo), allow_unused=True
                        )
                        for (layer, _), gradient in zip(edges, found, strict=True):
                            if gradient is not None:
                                name = layers[layer]
                                mask = real_mask(name, gradient, part, layer in decoding)
                                sums.add(name, gradient, mask, counted=number == 1)
                    sums.count(part)
        partial = sums.partial({}, transposed_names(layers))
        partial.uncovered = uncovered(model, partial.sums) if partial.counts else ()
        return partial

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """Means over real tokens, float32 [out, out], by the weight's name.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """
        return means(self.kind, partial)

    def key(self) -> dict[str, Any]:
        """What, beside weights and data, the numbers depend on."""
        return {"statistic": self.kind, "version": self.version, **settings_key(self.settings)}
