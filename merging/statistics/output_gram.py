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
    decoder_mask,
    device_of,
    layer_names,
    means,
    transposed_names,
)
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
    version: ClassVar[int] = 1
    settings_type: ClassVar[type[StatisticSettings]] = OutputGramSettings
    settings: OutputGramSettings

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """One forward pass a batch, and a backward pass for every class but one (`exact`), or one.

        Raises:
            StatisticsError: The estimator does not fit the task.
        """
        layers = layer_names(model)
        transposed = transposed_names(layers)
        sums = GramSums()
        edges: list[tuple[nn.Module, GradientEdge]] = []
        decoding: set[nn.Module] | None = None

        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if output.shape[-1] > self.settings.largest:
                return None
            tapped: Tensor
            tapped, found = tap(output, len(output))
            edges.extend((layer, edge) for edge in found if edge is not None)
            return tapped

        with ExitStack() as restore:
            restore.enter_context(differentiable(model, parameters=False))
            for batch in batches:
                batch = batch.to(device_of(model))
                if decoding is None:
                    decoding = decoder_layers(model, task.logits, layers, batch)
                    for layer in layers:
                        restore.callback(layer.register_forward_hook(hook).remove)
                masks = {False: batch.mask, True: decoder_mask(batch)}
                edges.clear()
                todo = objectives(task.logits(model, batch), batch, self.settings)
                places = [edge for _, edge in edges]
                for number, objective in enumerate(todo, start=1):
                    found = torch.autograd.grad(objective, places, retain_graph=number < len(todo), allow_unused=True)
                    for (layer, _), gradient in zip(edges, found, strict=True):
                        if gradient is not None:
                            mask = masks[layer in decoding]
                            sums.add(layers[layer], gradient, mask, counted=number == 1)
                sums.count(batch)
        return sums.partial({}, transposed)

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """Means over real tokens, float32 [out, out], by the weight's name.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """
        return means(self.kind, partial)

    def key(self) -> dict[str, Any]:
        """What, beside weights and data, the numbers depend on."""
        return {"statistic": self.kind, "version": self.version, **settings_key(self.settings)}
