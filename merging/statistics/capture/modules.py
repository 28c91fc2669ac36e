"""Which modules of a model give single examples' gradients of which parameters, found by running it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from merging.checkpoints.models.parameter_names import checkpoint_names
from merging.errors import StatisticsError
from merging.statistics.capture.hooks import differentiable, expand
from merging.tasks.task import Batch

Logits = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Unit:
    """A module whose output holds one row an example, and the parameters whose gradients are taken there.

    Args:
        path: The module's name in the model.
        module: The module; a parameter's own, or the nearest one around it that tells examples apart.
        parameters: Name within the module → name in the checkpoint.
        mapped: For each call in a pass, which leaves of (args, kwargs) hold one row an example; None
            for what was not seen (a mask that is made only where there is padding).
    """

    path: str
    module: nn.Module
    parameters: Mapping[str, str]
    mapped: tuple[tuple[bool | None, ...], ...]


@dataclass
class _Extents:
    """Leading extents of what went into a module and of what came out of it (None: not a tensor with one)."""

    inputs: list[int | None]
    outputs: list[int | None]
    broadcast: list[Tensor]


def first_example(batch: Batch, times: int) -> Batch:
    """The batch's first example, `times` over."""

    def repeat(value: Tensor) -> Tensor:
        return torch.cat([value[:1]] * times)

    inputs = {name: repeat(value) for name, value in batch.inputs.items()}
    mask = None if batch.mask is None else repeat(batch.mask)
    return Batch(inputs, repeat(batch.labels), repeat(batch.indices), mask)


def find_units(model: nn.Module, logits: Logits, batch: Batch) -> list[Unit]:
    """Finds for every parameter that the model uses a unit that tells examples apart.

    The model runs on one example and on the same example twice: what grows from one row to two holds a row
    an example; what stays at one is broadcast, and can be expanded where both examples then get one gradient.

    Raises:
        StatisticsError: Not even the whole model's output tells examples apart.
    """
    with torch.no_grad(), _watch(model) as single:
        logits(model, first_example(batch, 1))
    with differentiable(model, parameters=True), _watch(model, expand_to=2) as double:
        output = logits(model, first_example(batch, 2))
        used = _used(model, output, double)
    names = checkpoint_names(model)
    # A module that is never called may hold a weight that is tied to another's, or that its parent reads.
    at_calls = {id(own) for path in single for own in model.get_submodule(path).parameters(recurse=False)}
    by_owner: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if path in single:
                owner = _nearest(path, single, double)
            elif id(parameter) in at_calls:
                continue
            else:
                owner = _nearest(path, single, double) if id(parameter) in used else path
            inside = f"{path}.{local}".removeprefix(f"{owner}.").removeprefix(".")
            by_owner.setdefault(owner, {})[inside] = names[id(parameter)]
    return [
        Unit(path, model.get_submodule(path), parameters, _mapped(single.get(path, []), double.get(path, [])))
        for path, parameters in by_owner.items()
    ]


@contextmanager
def _watch(model: nn.Module, expand_to: int = 1) -> Iterator[dict[str, list[_Extents]]]:
    """Yields each called module's calls, in order, filled while the model runs; expands what is broadcast."""
    calls: dict[str, list[_Extents]] = {}

    def watch(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            inputs, outputs = _extents(args, kwargs), _extents(output, floating=True)
            output, broadcast = expand(output, expand_to)
            calls.setdefault(path, []).append(_Extents(inputs, outputs, broadcast))
            return output

        return hook

    handles = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in model.named_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _extents(*values: Any, floating: bool = False) -> list[int | None]:
    leaves = tree_flatten(values)[0]
    return [
        len(leaf)
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and (leaf.is_floating_point() or not floating)
        else None
        for leaf in leaves
    ]


def _used(model: nn.Module, output: Tensor, calls: Mapping[str, list[_Extents]]) -> set[int]:
    """`id`s of the parameters that the output depends on; empties calls whose expansion was no broadcast."""
    parameters = list(model.parameters())
    broadcast = [tensor for made in calls.values() for call in made for tensor in call.broadcast]
    weights = torch.linspace(-1, 2, output[0].numel(), dtype=output.dtype, device=output.device)
    objective = (output * weights.view(1, *output.shape[1:])).sum()
    gradients = torch.autograd.grad(objective, [*parameters, *broadcast], allow_unused=True)
    even = {
        id(tensor): gradient is None or torch.allclose(gradient[0], gradient[1], rtol=1e-3, atol=1e-5)
        for tensor, gradient in zip(broadcast, gradients[len(parameters) :], strict=True)
    }
    for made in calls.values():
        if not all(even[id(tensor)] for call in made for tensor in call.broadcast):
            made.clear()
    return {id(p) for p, gradient in zip(parameters, gradients, strict=False) if gradient is not None}


def _nearest(path: str, single: Mapping[str, list[_Extents]], double: Mapping[str, list[_Extents]]) -> str:
    """The module, or the nearest around it, whose every output holds one row an example or is broadcast."""
    around = path
    while not _tells_apart(single.get(around, []), double.get(around, [])):
        if not around:
            raise StatisticsError(
                f"'{path}' runs where single examples cannot be told apart, so it has no gradients for each: "
                "its model must be called as a whole, with one row of every input and output an example"
            )
        around = around.rpartition(".")[0]
    return around


def _tells_apart(once: list[_Extents], twice: list[_Extents]) -> bool:
    if not once or len(once) != len(twice):
        return False
    pairs = [
        pair
        for one, two in zip(once, twice, strict=True)
        for pair in zip(one.outputs, two.outputs, strict=True)
        if pair != (None, None)
    ]
    return all(pair in ((1, 2), (1, 1)) for pair in pairs)


def _mapped(once: list[_Extents], twice: list[_Extents]) -> tuple[tuple[bool | None, ...], ...]:
    return tuple(
        tuple(None if pair == (None, None) else pair == (1, 2) for pair in zip(one.inputs, two.inputs, strict=True))
        for one, two in zip(once, twice, strict=True)
    )
