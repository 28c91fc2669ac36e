"""One member's part: its own forward passes beside the merged model's, on the member's examples."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.evaluation.shared_weights import share_weights
from merging.propagation.equations import Equations
from merging.propagation.execution_order import Call, trace
from merging.propagation.merged_layers import Layer, merged_layers
from merging.propagation.paused_forward import HookPoint, Stop, Stream
from merging.propagation.repeated_passes import RepeatedPasses
from merging.propagation.settings import PropagationSettings
from merging.statistics.capture.hooks import without_cache
from merging.statistics.capture.linear_calls import LinearCalls, inspect_calls, row_mask
from merging.statistics.capture.single_examples import single_examples
from merging.tasks.task import Batch, Task

TRACED = 8
"""Examples on which a member is watched beforehand: enough to tell a rule from a chance."""


@dataclass(frozen=True)
class PassPlan:
    """What is known of a member's passes before they begin.

    Args:
        member: The member's name.
        layers: By the base's name of its weight, every merged linear layer.
        calls: The same of those that run once, in the order in which they run.
    """

    member: str
    layers: Mapping[str, Layer]
    calls: Mapping[str, Call]


class MemberPasses:
    """A member that says, layer after layer, what the merged model should put out on the member's examples.

    Where batches make layers read other rows than their examples alone, the examples run alone, without padding. A weight
    that is also read outside of its layer is not fitted.

    Args:
        pool: The pool.
        member: The member's name.
        task: Its task, bound to its checkpoint.
        out: The merged model's weights by the base's name, float32, on the device; whoever solves overwrites them.
        settings: What to do.

    Raises:
        MethodError: The task has no logits or no training examples.
    """

    def __init__(
        self, pool: Pool, member: str, task: Task, out: MutableMapping[str, Tensor], settings: PropagationSettings
    ) -> None:
        if not task.has_logits or not task.size("train"):
            raise MethodError(
                f"{member}: its task '{task.name}' ({task.kind}) has no train examples to run models on, which RegMean "
                "propagated needs (no labels): add a train split, or leave the member out"
            )
        device = next(iter(out.values())).device
        self.member, self._task, self._settings, self._device = member, task, settings, device
        self._own = task.load_model().to(device).eval()
        merged = task.load_model()
        shared = share_weights(merged, pool, pool.members[member], out)
        shared.require_no_copies()
        self._merged = merged.to(device).eval()
        for model in (self._own, self._merged):
            without_cache(model)
        self.layers: Mapping[str, Layer] = merged_layers(self._merged, out)
        stop = min(settings.examples, task.size("train"))
        (few,) = task.batches("train", 0, min(TRACED, stop), TRACED)
        paths = {layer.path: name for name, layer in self.layers.items()}
        few = few.to(device)
        inspected = self._inspected(paths, few)
        calls = trace(self._own, task, paths, few)
        self.calls: Mapping[str, Call] = {
            name: call for name, call in calls.items() if name not in inspected.incomplete
        }
        self.plan = PassPlan(member, self.layers, self.calls)
        batches = [batch.to(device) for batch in task.batches("train", 0, stop, settings.batch_size)]
        if not inspected.unlike.isdisjoint(self.calls):
            batches = [one for batch in batches for one in single_examples(batch, unpadded=True)]
        self._batches = batches
        self._streams: list[Stream | RepeatedPasses] = []
        self._last: dict[HookPoint, str] = {}

    def begin(self, groups: Sequence[Sequence[str]]) -> None:
        """Starts the passes, which will stop before the first layer of each group of weights."""
        update = self._settings.update
        stops = [self.calls[group[0]].path for group in groups]
        places: list[list[HookPoint]] = [[] for _ in groups]
        if update == "propagated":
            places = [[place for name in group if (place := self.calls[name].residual)] for group in groups]
            names = [name for group in groups for name in group]
            self._last = {place: name for name in names if (place := self.calls[name].residual)}
        models = {"propagated": [self._own, self._merged], "regmean++": [self._merged], "regmean": [self._own]}[update]
        for model in models:
            runs = [partial(self._task.logits, model, batch) for batch in self._batches]
            self._streams.append(
                RepeatedPasses(model, runs, stops, places)
                if self._settings.recompute
                else Stream(model, runs, stops, [*self._last])
            )

    def end(self) -> None:
        """Gives the rest of the passes up."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    @torch.no_grad()
    def equations(self, group: Sequence[str]) -> Equations:
        """Leads the passes to a group of layers, and sums what they read and miss there.

        Args:
            group: The weights of layers that share an input, as given to `begin`, in their order.

        Raises:
            MethodError: An activation is not finite.
        """
        call = self.calls[group[0]]
        biased = self.layers[group[0]].bias is not None
        equations = Equations(self._device)
        stops = zip(*(stream.advance() for stream in self._streams), strict=True)
        # Where only one of the two models runs, it stands for both.
        for batch, (own, *_, merged) in zip(self._batches, (pair * 2 for pair in stops), strict=True):
            take = partial(call.rows.take, mask=row_mask(batch, call.decoding, merged.input.shape[:-1]))
            wanted = torch.cat([self._wanted(name, own, merged, take) for name in group], dim=1)
            read = take(merged.input)
            missed = wanted - torch.cat([self._output(self._merged, name, read) for name in group], dim=1)
            equations.update(torch.cat([read, read.new_ones(len(read), 1)], dim=1) if biased else read, missed, wanted)
        if not equations.finite:
            raise MethodError(
                f"{self.member}: what enters or should leave '{group[0]}' holds NaN or Inf on its {self._task.name} "
                "examples: its weights make it overflow; leave the member out"
            )
        return equations

    def _inspected(self, paths: Mapping[str, str], few: Batch) -> LinearCalls:
        """Which layers read in a batch what single examples do not make them read."""
        modules = {self._own.get_submodule(path): name for path, name in paths.items()}
        return inspect_calls(self._own, self._task.logits, modules, few)

    def _wanted(self, name: str, own: Stop, merged: Stop, take: Callable[[Tensor], Tensor]) -> Tensor:
        """What a layer should put out: the member's output, and what the residual stream has lost so far."""
        wanted = self._output(self._own, name, take(own.input))
        place = self.calls[name].residual
        if place in self._last:
            wanted = wanted + take(own.kept[place] - merged.kept[place])
            if self._last[place] == name:
                del own.kept[place], merged.kept[place]
        return wanted

    def _output(self, model: nn.Module, name: str, rows: Tensor) -> Tensor:
        """W x + b of a model's layer."""
        layer = self.layers[name]
        module: Any = model.get_submodule(layer.path)
        return layer.output(module.weight, module.bias if layer.bias else None, rows)
