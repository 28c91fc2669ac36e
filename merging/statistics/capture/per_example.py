"""Runs a model so that squares of single examples' gradients can be summed, without a loop over examples."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from merging.errors import StatisticsError
from merging.statistics.capture.grad_samplers import rule_for
from merging.statistics.capture.hooks import differentiable, tap
from merging.statistics.capture.modules import Logits, Unit, find_units
from merging.statistics.capture.per_sample_grads import Computed, Piece, add_squares
from merging.tasks.task import Batch


@dataclass
class _Call:
    """One call of a unit: the leaves of what went in, and where to take the gradients of what came out."""

    unit: Unit
    index: int
    leaves: list[Any]
    spec: TreeSpec
    edges: list[GradientEdge | None]


class PerExample:
    """A context in which a model's passes are recorded; the model is put back as it was at the end.

    Args:
        model: A model in evaluation mode.
        logits: Runs the model on a batch.
    """

    def __init__(self, model: nn.Module, logits: Logits) -> None:
        self._model = model
        self._logits = logits
        self._restore = ExitStack()
        self._probed = False
        self._calls: list[_Call] = []
        self._examples = 0
        self._recording = False

    def __enter__(self) -> "PerExample":
        # Only the gradients of outputs are differentiated; those of parameters follow from them by the rules.
        self._restore.enter_context(differentiable(self._model, parameters=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore.close()
        self._calls = []

    def forward(self, batch: Batch) -> Tensor:
        """The batch's logits, recorded for `add_squares`.

        Raises:
            StatisticsError: A layer runs where single examples cannot be told apart.
        """
        if not self._probed:
            for unit in find_units(self._model, self._logits, batch):
                handle = unit.module.register_forward_hook(self._hook(unit), with_kwargs=True)
                self._restore.callback(handle.remove)
            self._probed = True
        self._calls = []
        self._examples = len(batch.indices)
        self._recording = True
        try:
            return self._logits(self._model, batch)
        finally:
            self._recording = False

    def add_squares(self, objective: Tensor, sums: dict[str, Tensor], *, last: bool) -> None:
        """Adds Σ_n (∇ of example n's part of the objective)² to `sums`, for every parameter.

        Args:
            objective: A scalar computed from the last `forward`'s logits: a sum with one term an example.
            sums: Name in the checkpoint → sum, changed in place.
            last: Whether the recorded pass may be forgotten.
        """
        edges = [edge for call in self._calls for edge in call.edges if edge is not None]
        found = iter(torch.autograd.grad(objective, edges, retain_graph=not last, allow_unused=True))
        pieces: dict[str, list[Piece]] = {}
        with torch.no_grad():
            for call in self._calls:
                gradients = [None if edge is None else next(found) for edge in call.edges]
                for local, piece in self._pieces(call, gradients).items():
                    pieces.setdefault(call.unit.parameters[local], []).append(piece)
            for name, uses in pieces.items():
                add_squares(uses, self._examples, sums[name])
        if last:
            self._calls = []

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._recording:
                return output
            index = sum(call.unit is unit for call in self._calls)
            leaves, spec = tree_flatten((args, kwargs))
            output, edges = tap(output, self._examples)
            self._calls.append(_Call(unit, index, leaves, spec, edges))
            return output

        return hook

    def _pieces(self, call: _Call, gradients: Sequence[Tensor | None]) -> dict[str, Piece]:
        if all(gradient is None for gradient in gradients):
            return {}
        rule = rule_for(call.unit)
        tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
        if rule is None or len(tensors) != 1 or len(gradients) != 1 or gradients[0] is None:
            return _pulled_back(call, gradients, self._examples)
        value = tensors[0].detach()
        if len(gradients[0]) != self._examples:
            raise StatisticsError(
                f"'{call.unit.path}' runs for some examples only, so its examples cannot be told apart"
            )
        if len(value) == 1 < self._examples:
            value = value.expand(self._examples, *value.shape[1:])
        pieces = rule(call.unit.module, value, gradients[0])
        return {local: pieces[local] for local in call.unit.parameters}


def _pulled_back(call: _Call, gradients: Sequence[Tensor | None], examples: int) -> dict[str, Piece]:
    """Any module's: it runs again on single examples; its outputs' gradients are pulled back through it."""
    unit = call.unit
    # What the probe did not see, a call that only some examples make, is judged by its extent.
    seen = unit.mapped[call.index] if call.index < len(unit.mapped) else ()
    places = [
        place
        for place, (leaf, mapped) in enumerate(zip_longest(call.leaves, seen[: len(call.leaves)]))
        if isinstance(leaf, Tensor) and (leaf.shape[:1] == (examples,) if mapped is None else mapped)
    ]
    wanted = [place for place, gradient in enumerate(gradients) if gradient is not None]
    values = [call.leaves[place].detach() for place in places]
    cotangents = [gradient for gradient in gradients if gradient is not None]
    others = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
    own = dict(unit.module.named_parameters(remove_duplicate=False))

    def between(local: str) -> Callable[[int, int], Tensor]:
        def single(value: list[Tensor], cotangent: list[Tensor]) -> Tensor:
            def run(parameter: Tensor) -> list[Tensor]:
                leaves = list(others)
                for place, one in zip(places, value, strict=True):
                    leaves[place] = one[None]
                args, kwargs = tree_unflatten(leaves, call.spec)
                output = functional_call(unit.module, {local: parameter}, args, kwargs, tie_weights=False)
                outputs = tree_flatten(output)[0]
                return [outputs[place] for place in wanted]

            return vjp(run, own[local].detach())[1]([one[None] for one in cotangent])[0]  # type: ignore[no-any-return]

        def compute(start: int, stop: int) -> Tensor:
            parts = [value[start:stop] for value in values], [gradient[start:stop] for gradient in cotangents]
            with torch.enable_grad():
                try:
                    return vmap(single)(*parts)
                except RuntimeError:
                    # Its Python looks into its tensors, which vmap cannot follow: one example after another.
                    rows = [single([v[n] for v in parts[0]], [g[n] for g in parts[1]]) for n in range(stop - start)]
                    return torch.stack(rows)

        return compute

    return {local: Computed(between(local)) for local in unit.parameters}
