"""Runs a model so that squares of single examples' gradients can be summed, without a loop over examples."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from merging.errors import StatisticsError
from merging.statistics.gradients import Computed, Dense, Outer, Piece, Rows, add_squares
from merging.statistics.recording import differentiable, tap
from merging.statistics.units import Logits, Unit, find_units
from merging.tasks.base import Batch

Rule = Callable[[Any, Tensor, Tensor], dict[str, Piece]]
"""(module, its input, gradient of its output) → parameter's name within the module → its gradients."""


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
        rule = _rule(call.unit)
        tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
        if rule is None or len(tensors) != 1 or len(gradients) != 1 or gradients[0] is None:
            return _pulled_back(call, gradients, self._examples)
        value = tensors[0].detach()
        if len(gradients[0]) != self._examples:
                f"'{call.unit.path}' runs for some examples only, so per-example gradients cannot be told apart"
                f"'{call.unit.path}' runs for some examples only, so its examples cannot be told apart"
            )
        if len(value) == 1 < self._examples:
            value = value.expand(self._examples, *value.shape[1:])
        pieces = rule(call.unit.module, value, gradients[0])
        return {local: pieces[local] for local in call.unit.parameters}


def _linear(module: nn.Linear, value: Tensor, gradient: Tensor) -> dict[str, Piece]:
    value, gradient = _positions(value), _positions(gradient)
    return {"weight": Outer(gradient, value), "bias": Dense(gradient.sum(1))}


def _conv1d(module: Conv1D, value: Tensor, gradient: Tensor) -> dict[str, Piece]:
    value, gradient = _positions(value), _positions(gradient)
    return {"weight": Outer(value, gradient), "bias": Dense(gradient.sum(1))}


def _embedding(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> dict[str, Piece]:
    values = _positions(gradient)
    ids = ids.reshape(len(ids), -1)
    if module.padding_idx is not None:
        values = values.masked_fill((ids == module.padding_idx)[..., None], 0)
    return {"weight": Rows(ids, values)}


def _layer_norm(module: nn.LayerNorm, value: Tensor, gradient: Tensor) -> dict[str, Piece]:
    normal = F.layer_norm(value, module.normalized_shape, eps=module.eps)
    return {
        "weight": Dense(_over_positions(normal * gradient, len(module.normalized_shape))),
        "bias": Dense(_over_positions(gradient, len(module.normalized_shape))),
    }


def _conv2d(module: nn.Conv2d, value: Tensor, gradient: Tensor) -> dict[str, Piece]:
    patches = F.unfold(
        value, module.kernel_size, module.dilation, cast(tuple[int, int], module.padding), module.stride
    )
    by_position = gradient.flatten(2).transpose(1, 2)
    return {"weight": Outer(by_position, patches.transpose(1, 2)), "bias": Dense(by_position.sum(1))}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.Conv2d: _conv2d,
}


    """The short way for a unit's kind of layer; none for subclasses that compute something else."""
    """The short way for a unit's kind of layer; none for subclasses that compute something else."""
    module = unit.module
    if not unit.parameters.keys() <= {"weight", "bias"}:
        return None
    if isinstance(module, nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return None
    return next((rule for kind, rule in RULES.items() if type(module).forward is kind.forward), None)


def _positions(value: Tensor) -> Tensor:
    """[N, …, D] as [N, S, D]; [N, D] as [N, 1, D]."""
    return value.reshape(len(value), -1, value.shape[-1])


def _over_positions(value: Tensor, kept: int) -> Tensor:
    """[N, …, *kept] summed to [N, *kept]."""
    between = tuple(range(1, value.dim() - kept))
    return value.sum(between) if between else value


    """Any module's: it runs again on single examples, and its outputs' gradients are pulled back through it."""
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
                    rows = [
                        single([v[n] for v in parts[0]], [g[n] for g in parts[1]])
                        for n in range(stop - start)
                    ]
                    return torch.stack(rows)

        return compute

    return {local: Computed(between(local)) for local in unit.parameters}
