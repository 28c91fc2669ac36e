"""Gram matrices of the gradients at linear layers' outputs: K-FAC's B_t."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from merging.statistics.capture.hooks import differentiable, tap
from merging.statistics.capture.layers import device_of, layer_names, transposed_names, uncovered
from merging.statistics.capture.linear_calls import LinearCalls, inspect_calls, real_mask
from merging.statistics.capture.patches import row_dimensions, rows_written
from merging.statistics.gram_sums import GramStatistic, GramSums
from merging.statistics.likelihood import LikelihoodSettings, objectives
from merging.statistics.statistic import Partial, StatisticSettings, register
from merging.tasks.task import Batch, Task


class OutputGramSettings(LikelihoodSettings):
    """Settings of output Grams."""

    largest: int = Field(
        16384,
        ge=1,
        description="Layers with more outputs than this (a vocabulary's) are left out: theirs is [out, out].",
    )


@register
class OutputGram(GramStatistic):
    """B = (1/tokens) Σ g gᵀ [out, out] for every linear layer's weight, g the gradient of log p(c|x) there.

    Of a convolution's outputs every place is a row, and each group has its own: [groups, out, out].
    The sum is over real tokens and, weighted by p(c|x), over classes; what is drawn or observed, for the other
    estimators. With the Gram A of the layer's input, A ⊗ B stands for its block of the Fisher (MaTS, K-FAC).
    """

    kind: ClassVar[str] = "output_gram"
    version: ClassVar[int] = 4
    settings_type: ClassVar[type[StatisticSettings]] = OutputGramSettings
    settings: OutputGramSettings

    def accumulate(self, model: nn.Module, task: Task, batches: Iterable[Batch], *, alone: bool) -> Partial:
        """One forward pass a batch, or an example, and a backward pass for every class but one (`exact`), or one.

        Raises:
            StatisticsError: The estimator does not fit the task.
            UnaccountableRowsError: See `GramStatistic`.
        """
        layers = layer_names(model)
        sums, left_out = GramSums(), set[str]()
        edges: list[tuple[nn.Module, GradientEdge]] = []
        calls: LinearCalls | None = None
        likelihood = task.likelihood(model)

        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if rows_written(layer, output).shape[-1] > self.settings.largest:
                left_out.add(layers[layer])
                return None
            tapped: Tensor
            tapped, tapped_edges = tap(output, len(output))
            edges.extend((layer, edge) for edge in tapped_edges if edge is not None)
            # What follows may change its input in place, and would lose the edge.
            return tapped.clone() if tapped is output else tapped

        with ExitStack() as restore:
            restore.enter_context(differentiable(model, parameters=False))
            for batch in batches:
                batch = batch.to(device_of(model))
                if calls is None:
                    calls = inspect_calls(model, task.logits, layers, batch)
                    layers = {layer: name for layer, name in layers.items() if name not in calls.incomplete}
                    for layer in layers:
                        restore.callback(layer.register_forward_hook(hook).remove)
                for part in calls.parts(batch, alone=alone):
                    edges.clear()
                    todo = objectives(task.logits(model, part), part, self.settings, likelihood)
                    places = [edge for _, edge in edges]
                    for number, objective in enumerate(todo, start=1):
                        gradients = torch.autograd.grad(
                            objective, places, retain_graph=number < len(todo), allow_unused=True
                        )
                        for (layer, _), gradient in zip(edges, gradients, strict=True):
                            if gradient is not None:
                                name, dimensions = layers[layer], row_dimensions(layer)
                                rows = rows_written(layer, gradient)
                                mask = real_mask(name, rows, part, layer in calls.decoding, dimensions)
                                sums.add(name, rows, mask, counted=number == 1, dimensions=dimensions)
                    sums.count(part)
        partial = sums.partial({}, transposed_names(layers))
        if partial.counts:
            partial.unreached = tuple(sorted({*layers.values()} - {*partial.sums, *left_out}))
            partial.uncovered = uncovered(model, {*partial.sums, *partial.unreached})
        return partial
