"""Runs a model so that squares of single examples' gradients can be summed, without a loop over examples."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp, vmap
from torch.nn.functional import pad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from merging.checkpoints.models.parameter_names import checkpoint_names
from merging.errors import StatisticsError
from merging.faults import is_fault
from merging.statistics.capture.grad_samplers import rule_for
from merging.statistics.capture.hooks import differentiable, tap
from merging.statistics.capture.modules import Logits, Unit, find_units
from merging.statistics.capture.per_sample_grads import (
    Computed,
    GradientTerm,
    add_squares,
    as_matrix,
    weighted_product,
)
from merging.statistics.capture.single_examples import padding_token, single_examples, unlike_pair
from merging.statistics.capture.verification import differs, probe_gradient
from merging.tasks.task import IGNORED, Batch

logger = logging.getLogger(__name__)

VECTORS = 8
"""By so many random products are two gradients compared: of one, the number may be near 0 by chance."""


@dataclass
class _UnitCall:
    """One call of a unit: the leaves of what went in, and where to take the gradients of what came out."""

    unit: Unit
    index: int
    leaves: list[Any]
    spec: TreeSpec
    edges: list[GradientEdge | None]


class PerExample:
    """A context in which a model's passes are recorded; the model is put back as it was at the end.

    Gradients follow from what goes into layers and from their outputs' gradients. Whether these make up torch's own
    gradients is tried for two examples of the first batch, and once for every other way in which the model's layers run;
    where they do not (a weight that is read outside of its layer, what is shared by a batch), or where padding changes the
    logits, every example runs alone, without padding.

    Args:
        model: A model in evaluation mode.
        logits: Runs the model on a batch.
    """

    def __init__(self, model: nn.Module, logits: Logits) -> None:
        self._model = model
        self._logits = logits
        self._restore = ExitStack()
        self._probed = False
        self._alone = False
        self._verified: set[tuple[Any, ...]] = set()
        self._calls: list[_UnitCall] = []
        self._examples = 0
        self._recording = False
        self._graphs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        names = checkpoint_names(model)
        self._names = {names[id(parameter)]: parameter for parameter in model.parameters()}

    def __enter__(self) -> "PerExample":
        # Only the gradients of outputs are differentiated; those of parameters follow from them by the rules.
        self._restore.enter_context(differentiable(self._model, parameters=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore.close()
        self._forget()

    def forward(self, batch: Batch) -> Tensor:
        """The batch's logits, recorded for `add_squares`."""
        self._forget()
        if len(batch.indices) > 1 and not self._alone:
            try:
                if self._verified or self._pair_adds_up(batch):
                    output = self._recorded(batch)
                    if self._adds_up(batch, output):
                        return output
            except Exception as error:  # a model's code may raise anything where its tensors are expanded
                if is_fault(error):
                    raise
                logger.debug("examples run alone: the model cannot be recorded", exc_info=True)
            self._forget()
            self._alone = True
        self._examples = len(batch.indices)
        return self._separate(batch)

    def add_squares(self, objective: Tensor, sums: dict[str, Tensor], *, last: bool) -> None:
        """Adds Σ_n (∇ of example n's part of the objective)² to `sums`, for every parameter.

        Args:
            objective: A scalar computed from the last `forward`'s logits: a sum with one term an example.
            sums: Name in the checkpoint → sum, changed in place.
            last: Whether the recorded pass may be forgotten.
        """
        if self._outputs:
            for gradients in self._gradients(torch.autograd.grad(objective, self._outputs), last=last):
                for name, gradient in gradients.items():
                    sums[name] += gradient.square()
        else:
            for name, uses in self._uses(objective, last=last).items():
                add_squares(uses, self._examples, sums[name])
        if last:
            self._forget()

    def _recorded(self, batch: Batch) -> Tensor:
        """The batch's logits, with what every unit was given and where its outputs' gradients are."""
        if not self._probed:
            for unit in find_units(self._model, self._logits, batch):
                handle = unit.module.register_forward_hook(self._hook(unit), with_kwargs=True)
                self._restore.callback(handle.remove)
            self._probed = True
        self._forget()
        self._examples = len(batch.indices)
        self._recording = True
        try:
            return self._logits(self._model, batch)
        finally:
            self._recording = False

    def _pair_adds_up(self, batch: Batch) -> bool:
        """Whether padding does not matter to two examples of a batch, and their gradients add up."""
        pair = unlike_pair(batch, padding_token(self._model))
        return not self._padding_matters(pair) and self._adds_up(pair, self._recorded(pair))

    def _padding_matters(self, pair: Batch) -> bool:
        """Whether two examples' logits are others than each one's alone, without padding."""
        with torch.no_grad():
            together = self._logits(self._model, pair)
            alone = [self._logits(self._model, one) for one in single_examples(pair, unpadded=True)]
        if together.dim() == 2:
            return differs(torch.cat(alone), together)
        return any(
            differs(one[0, : len(row)][real], row[: one.shape[1]][real])
            for one, row, labels in zip(alone, together, pair.labels, strict=True)
            if bool((real := labels[: one.shape[1]] != IGNORED).any())
        )

    def _separate(self, batch: Batch) -> Tensor:
        """The batch's logits, every example's without padding, with a graph of its own that leads to the parameters."""
        with differentiable(self._model, parameters=True):
            self._graphs = [self._logits(self._model, one) for one in single_examples(batch, unpadded=True)]
        self._outputs = [graph.detach().requires_grad_() for graph in self._graphs]
        if batch.labels.dim() == 1 or self._outputs[0].dim() == 2:
            return torch.cat(self._outputs)
        width = batch.labels.shape[1]
        return torch.cat([pad(output, (0, 0, 0, width - output.shape[1])) for output in self._outputs])

    def _gradients(self, seeds: Sequence[Tensor], *, last: bool) -> Iterator[dict[str, Tensor]]:
        """Every example's gradient of the parameters that it depends on."""
        parameters = list(self._names.values())
        for graph, seed in zip(self._graphs, seeds, strict=True):
            with differentiable(self._model, parameters=True):
                gradients = torch.autograd.grad(graph, parameters, seed, retain_graph=not last, allow_unused=True)
            yield {name: g for name, g in zip(self._names, gradients, strict=True) if g is not None}

    def _uses(self, objective: Tensor, *, last: bool) -> dict[str, list[GradientTerm]]:
        """Name in the checkpoint → what every use of the parameter contributes to the examples' gradients."""
        edges = [edge for call in self._calls for edge in call.edges if edge is not None]
        every = iter(torch.autograd.grad(objective, edges, retain_graph=not last, allow_unused=True))
        pieces: dict[str, list[GradientTerm]] = {}
        with torch.no_grad():
            for call in self._calls:
                gradients = [None if edge is None else next(every) for edge in call.edges]
                for local, piece in self._pieces(call, gradients).items():
                    pieces.setdefault(call.unit.parameters[local], []).append(piece)
        return pieces

    def _adds_up(self, batch: Batch, output: Tensor) -> bool:
        """Whether the examples' gradients, each with a weight of its own, add up to torch's for every parameter.

        Tried once for every way in which the units run: another module, or another kind of argument, is another way.
        """
        way = tuple(
            (call.unit.path, tuple(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in call.leaves))
            for call in self._calls
        )
        if way in self._verified:
            return True
        seed = probe_gradient(output)
        if batch.is_sequential and batch.labels.shape == output.shape[:-1]:
            seed = seed * (batch.labels != IGNORED)[..., None]
        weights = torch.linspace(0.5, 1.5, self._examples, dtype=output.dtype)[_shuffled(self._examples)]
        weights = weights.to(output.device)
        by_example = seed * weights.view(-1, *[1] * (output.dim() - 1))
        whole, true = self._true_products(batch, by_example)
        largest = max((float(product.norm()) for product in true.values()), default=0.0)
        uses = self._uses((output * seed).sum(), last=False)
        for name, parameter in self._names.items():
            product = weighted_product(uses.get(name, []), weights, parameter, _vectors(parameter))
            if differs(product, true.pop(name, torch.zeros_like(product)), largest):
                logger.debug("examples run alone: what its layer's calls show of '%s' is not its gradient", name)
                return False
        if differs(output.detach(), whole.detach()):
            return False
        self._verified.add(way)
        return True

    def _true_products(self, batch: Batch, seed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's logits, and torch's gradients for theirs times `_vectors`; one parameter's is held at a time."""
        products: dict[str, Tensor] = {}

        def reduce(parameter: Tensor, name: str) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            products[name] = as_matrix(gradient) @ _vectors(parameter)

        with differentiable(self._model, parameters=True):
            whole = self._logits(self._model, batch)
            parameters: list[Any] = list(self._names.values())
            handles = [
                parameter.register_post_accumulate_grad_hook(partial(reduce, name=name))
                for name, parameter in zip(self._names, parameters, strict=True)
            ]
            try:
                torch.autograd.backward(whole, seed, inputs=parameters)
            finally:
                for handle in handles:
                    handle.remove()
        return whole, products

    def _forget(self) -> None:
        self._calls, self._graphs, self._outputs = [], [], []

    def _hook(self, unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._recording:
                return output
            index = sum(call.unit is unit for call in self._calls)
            leaves, spec = tree_flatten((args, kwargs))
            output, edges = tap(output, self._examples)
            self._calls.append(_UnitCall(unit, index, leaves, spec, edges))
            return output

        return hook

    def _pieces(self, call: _UnitCall, gradients: Sequence[Tensor | None]) -> dict[str, GradientTerm]:
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


def _pulled_back(call: _UnitCall, gradients: Sequence[Tensor | None], examples: int) -> dict[str, GradientTerm]:
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
                except RuntimeError as error:
                    if is_fault(
                        error
                    ):  # out of memory, say: one after another would hide it, and take many times as long
                        raise
                    # Its Python looks into its tensors, which vmap cannot follow: one example after another.
                    rows = [single([v[n] for v in parts[0]], [g[n] for g in parts[1]]) for n in range(stop - start)]
                    return torch.stack(rows)

        return compute

    return {local: Computed(between(local)) for local in unit.parameters}


def _shuffled(count: int) -> Tensor:
    """A permutation without a pattern, the same at every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _vectors(parameter: Tensor) -> Tensor:
    """Vectors [C, K] with which a parameter's gradient is multiplied, so that it is known by a few numbers a row."""
    columns = as_matrix(parameter).shape[1]
    drawn = torch.randn(columns, VECTORS, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    return drawn.to(parameter)
