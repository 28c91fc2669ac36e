"""Gram matrices of linear layers' inputs (RegMean's G_t, MaTS' and K-FAC's A_t)."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from merging.errors import StatisticsError
from merging.statistics.capture.experts import ExpertRows, stored_experts
from merging.statistics.capture.layers import device_of, layer_names, transposed_names, uncovered
from merging.statistics.capture.linear_calls import LinearCalls, given, inspect_calls, real_mask
from merging.statistics.capture.patches import is_convolution, row_dimensions, rows_read
from merging.statistics.capture.single_examples import padding_token, unlike_pair
from merging.statistics.gram_sums import GramStatistic, GramSums
from merging.statistics.statistic import Partial, StatisticSettings, register
from merging.tasks.task import Batch, Task

PATCH_BYTES = 1 << 26
"""Of what a convolution reads that are unfolded at once."""


class GramSettings(StatisticSettings):
    """Settings of Grams."""

    rank: int | None = Field(
        None,
        ge=1,
        description="Of layers with at least four times as many inputs n, keep a Nyström sketch of this rank r and the exact "
        "diagonal: (n + r) (r + 1) numbers in place of n². An approximation; by default all Grams are kept whole.",
    )

    def key(self) -> dict[str, Any]:
        """The settings that the numbers depend on: the rank only where there is one."""
        return {name: value for name, value in super().key().items() if name != "rank" or value is not None}


@register
class Gram(GramStatistic):
    """G = (1/tokens) Xᵀ X [in, in] for every linear layer's weight, X its inputs at real tokens.

    A convolution is a linear layer that reads, at each place, what its kernel sees there (the weight is [out, in] with all
    but its first dimension in one); of several groups each has its own Gram: [groups, in, in].

    Experts that are joined in one parameter have a Gram each, over the tokens that reach them: [experts, in, in], or one for
    each of the tensors that a checkpoint stores them in. One that no token reached has zeros.

    Layers that are given the same tensors (query, key and value) have one Gram, under the name of the first. A weight
    that is also read outside of its layer has none.

    With the setting `rank` those of wide layers are sketches (`merging.kernels.gram_sketch`).
    """

    kind: ClassVar[str] = "gram"
    version: ClassVar[int] = 3
    settings_type: ClassVar[type[StatisticSettings]] = GramSettings

    def accumulate(self, model: nn.Module, task: Task, batches: Iterable[Batch], *, alone: bool) -> Partial:
        """One forward pass a batch, or an example.

        Raises:
            StatisticsError: Layers share an input in one pass and not in another.
            UnaccountableRowsError: See `GramStatistic`.
        """
        layers = layer_names(model)
        recorder: _Recorder | None = None
        with torch.no_grad():
            try:
                for batch in batches:
                    batch = batch.to(device_of(model))
                    if recorder is None:
                        calls = inspect_calls(model, task.logits, layers, batch)
                        experts = ExpertRows(model)
                        rank = self.settings.rank if isinstance(self.settings, GramSettings) else None
                        recorder = _Recorder(layers, calls, experts, rank)
                        few = unlike_pair(batch, padding_token(model))
                        experts.verify(task.logits, next(calls.parts(few, alone=alone)))
                        recorder.open()
                    for part in calls.parts(batch, alone=alone):
                        recorder.start(part)
                        with recorder.experts.watching(recorder.see_expert):
                            task.logits(model, part)
            finally:
                if recorder is not None:
                    recorder.close()
        return Partial() if recorder is None else recorder.partial(model)


class _Recorder:
    """Sees what goes into each layer."""

    def __init__(self, layers: dict[nn.Module, str], calls: LinearCalls, experts: ExpertRows, rank: int | None) -> None:
        self._layers = {layer: name for layer, name in layers.items() if name not in calls.incomplete}
        self._decoding = calls.decoding
        self._holders = {name: holder for name, holder in calls.holders.items() if name not in calls.incomplete}
        self._holding = set(self._holders.values())
        self._sums = GramSums(rank)
        self.experts = experts
        self._batch: Batch | None = None
        self._inputs: dict[str, list[Tensor]] = defaultdict(list)
        self._shared: dict[str, str] = {}
        self._handles: list[Any] = []

    def open(self) -> None:
        """Begins to record."""
        self._handles = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in self._layers]

    def see_expert(self, name: str, expert: int, rows: Tensor) -> None:
        """Adds what reaches an expert."""
        self._sums.add(f"{name}[{expert}]", rows, None)

    def start(self, batch: Batch) -> None:
        """Begins a pass."""
        self._end()
        self._batch = self.experts.batch = batch
        self._sums.count(batch)

    def close(self) -> None:
        """Stops recording."""
        self._inputs.clear()
        self.experts.close()
        for handle in self._handles:
            handle.remove()

    def partial(self, model: nn.Module) -> Partial:
        """What was seen."""
        partial = self._sums.partial(self._shared, transposed_names(self._layers))
        for name, whole in self.experts.parameters.items():
            _store(partial, model, name, whole, self.experts.transposed[name], self._sums.nothing)
        seen = {*partial.sums, *partial.shared}
        partial.unreached = tuple(sorted({*self._layers.values()} - seen)) if seen else ()
        partial.uncovered = uncovered(model, {*seen, *partial.unreached})
        return partial

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._batch is not None
        value, name = given(args, kwargs), self._layers[layer]
        holder = self._holders.get(name, name)
        if name in self._holders or name in self._holding:
            # The tensors themselves are kept, so that their ids are not given to others within the pass.
            self._inputs[name].append(value)
        if name == holder:
            self._add(layer, name, value)
            return
        self._shared[name] = holder
        place = len(self._inputs[name]) - 1
        if len(self._inputs[holder]) <= place or self._inputs[holder][place] is not value:
            raise self._fickle(name, holder)

    def _add(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Adds what a layer reads; of a convolution a few examples at a time, for each number stands in many rows."""
        assert self._batch is not None
        dimensions, decoding = row_dimensions(layer), layer in self._decoding
        rows = [value]
        if is_convolution(layer):
            weight: Any = layer.weight
            size = max(1, PATCH_BYTES // max(1, value[:1].nbytes * weight[0, 0].numel()))
            rows = [value[start : start + size] for start in range(0, len(value), size)]
        if len(rows) == 1 or self._batch.mask is not None:
            read = rows_read(layer, value)
            mask = real_mask(name, read, self._batch, decoding, dimensions)
            self._sums.add(name, read, mask, dimensions=dimensions)
            return
        for part in rows:
            self._sums.add(name, rows_read(layer, part), None, dimensions=dimensions)

    def _end(self) -> None:
        """Looks whether those that share an input have shared all of them."""
        for name, holder in self._holders.items():
            if len(self._inputs[name]) != len(self._inputs[holder]):
                raise self._fickle(name, holder)
        self._inputs.clear()

    def _fickle(self, name: str, holder: str) -> StatisticsError:
        return StatisticsError(
            f"'{name}' shares its input with '{holder}' in one pass and not in another, so it has no Gram of its own: "
            "leave this model's Gram out"
        )


def _store(
    partial: Partial, model: nn.Module, name: str, whole: Tensor, transposed: bool, nothing: Callable[[int], Tensor]
) -> None:
    """Gives the experts of one parameter the names that a checkpoint has for them.

    Args:
        partial: Has sums and counts of those that were reached, as `name[expert]`.
        model: The model.
        name: The parameter's own name.
        whole: The parameter.
        transposed: It is stored [experts, in, out].
        nothing: The sum over no rows, of so many inputs.
    """
    inputs = whole.shape[1 if transposed else 2]
    keys = [f"{name}[{expert}]" for expert in range(len(whole))]
    grams = [partial.sums.pop(key, nothing(inputs)) for key in keys]
    counts = [partial.counts.pop(key, 0) for key in keys]
    stored = stored_experts(model, name, transposed)
    holders: dict[int, str] = {}
    for own, expert in stored.experts.items():
        if expert is None:
            partial.sums[own] = torch.stack(grams)
            partial.counts |= {f"{own}[{number}]": count for number, count in enumerate(counts)}
        elif expert in holders:
            partial.shared[own] = holders[expert]
        else:
            partial.sums[own], partial.counts[own] = grams[expert], counts[expert]
            holders[expert] = own
    partial.transposed = tuple(sorted({*partial.transposed, *stored.transposed}))
