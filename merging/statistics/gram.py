"""Gram matrices of linear layers' inputs (RegMean's G_t, MaTS' and K-FAC's A_t)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from merging.errors import StatisticsError
from merging.statistics.capture.layers import (
    decoder_layers,
    decoder_mask,
    device_of,
    layer_names,
    means,
    transposed_names,
)
from merging.statistics.gram_sums import GramSums
from merging.statistics.statistic import Partial, Statistic, register
from merging.tasks.task import Batch, Task


@register
class Gram(Statistic):
    """G = (1/tokens) Xᵀ X [in, in] for every linear layer's weight, X its inputs at real tokens.

    Layers that are given the same tensor (query, key and value) have one Gram, under the name of the first.
    """

    kind: ClassVar[str] = "gram"
    version: ClassVar[int] = 1

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """One forward pass a batch.

        Raises:
            StatisticsError: Layers share an input in one pass and not in another.
        """
        layers = layer_names(model)
        recorder: _Recorder | None = None
        with torch.no_grad():
            try:
                for batch in batches:
                    batch = batch.to(device_of(model))
                    if recorder is None:
                        recorder = _Recorder(layers, decoder_layers(model, task.logits, layers, batch))
                    recorder.start(batch)
                    task.logits(model, batch)
            finally:
                if recorder is not None:
                    recorder.close()
        return Partial() if recorder is None else recorder.partial()

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """Means over real tokens, float32 [in, in], by the weight's name, without those of `shared` names.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """
        return means(self.kind, partial)


class _Recorder:
    """Sees what goes into each layer, and who is given the same tensor."""

    def __init__(self, layers: dict[nn.Module, str], decoding: set[nn.Module]) -> None:
        self._layers = layers
        self._decoding = decoding
        self._sums = GramSums()
        self._shared: dict[str, str] = {}
        self._holders: dict[int, tuple[Tensor, str]] = {}
        self._masks: dict[bool, Tensor | None] = {}
        self._handles = [layer.register_forward_pre_hook(self._see) for layer in layers]

    def start(self, batch: Batch) -> None:
        """Begins a pass."""
        self._holders.clear()
        self._masks = {False: batch.mask, True: decoder_mask(batch)}
        self._sums.count(batch)

    def close(self) -> None:
        """Stops recording."""
        self._holders.clear()
        for handle in self._handles:
            handle.remove()

    def partial(self) -> Partial:
        """What was seen."""
        shared = {name: holder for name, holder in self._shared.items() if name != holder}
        return self._sums.partial(shared, transposed_names(self._layers))

    def _see(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        value, name = args[0], self._layers[layer]
        # The tensor is kept beside its holder's name, so that its id is not given to another within the pass.
        _, holder = self._holders.setdefault(id(value), (value, name))
        if self._shared.setdefault(name, holder) != holder:
            raise StatisticsError(
                f"'{name}' shares its input with '{holder}' in one pass and with '{self._shared[name]}' in "
                "another, so it has no Gram of its own: leave this model's Gram out"
            )
        if holder == name:
            self._sums.add(name, value, self._masks[layer in self._decoding])
