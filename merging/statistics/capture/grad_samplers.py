"""The short way from a layer's input and its output's gradient to single examples' gradients of its parameters."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from merging.checkpoints.models.parameter_names import conv1d
from merging.faults import is_fault
from merging.statistics.capture.modules import Unit
from merging.statistics.capture.patches import is_convolution, rows_read, rows_written
from merging.statistics.capture.per_sample_grads import Dense, GradientTerm, Outer, TableGradient
from merging.statistics.capture.verification import differs

Rule = Callable[[Any, Tensor, Tensor], dict[str, GradientTerm]]
"""(module, its input, gradient of its output) → parameter's name within the module → its gradients."""


def rule_for(unit: Unit) -> Rule | None:
    """The short way for a unit's kind of layer; none for subclasses that compute something else."""
    module = unit.module
    if not unit.parameters.keys() <= {"weight", "bias"}:
        return None
    if is_convolution(module) and getattr(module, "groups", 1) != 1:
        return None
    rules = {**RULES, conv1d(): _conv1d}
    known = next((rule for kind, rule in rules.items() if type(module).forward is kind.forward), None)
    return known or (_scaling if unit.parameters.keys() == {"weight"} and _scales(module) else None)


_SCALING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _scales(module: nn.Module) -> bool:
    """Whether a module is some vector of its input, made greater entry by entry by its weight, as RMS norms are: tried once."""
    if module not in _SCALING:
        _SCALING[module] = _tried_scaling(module)
    return _SCALING[module]


@torch.no_grad()
def _tried_scaling(module: nn.Module) -> bool:
    weight = dict(module.named_parameters())["weight"]
    if weight.dim() != 1:
        return False
    value = torch.linspace(-2, 3, 6 * len(weight), dtype=weight.dtype, device=weight.device).sin().view(2, 3, -1)
    other = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)
    try:
        without, scaled = _with_weight(module, value, 0 * other), _with_weight(module, value, other)
        wanted = without + other * (_with_weight(module, value, torch.ones_like(other)) - without)
    except Exception as error:  # a module that wants other inputs may raise anything
        if is_fault(error):
            raise
        return False
    return scaled.shape == value.shape and not differs(scaled, wanted)


def _scaling(module: nn.Module, value: Tensor, gradient: Tensor) -> dict[str, GradientTerm]:
    weight = dict(module.named_parameters())["weight"]
    with torch.no_grad():
        with_ones, without = (_with_weight(module, value, make(weight)) for make in (torch.ones_like, torch.zeros_like))
    return {"weight": Dense(_over_positions((with_ones - without) * gradient, 1))}


def _with_weight(module: nn.Module, value: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = functional_call(module, {"weight": weight}, (value,))
    return output


def _linear(module: nn.Linear, value: Tensor, gradient: Tensor) -> dict[str, GradientTerm]:
    value, gradient = _positions(value), _positions(gradient)
    return {"weight": Outer(gradient, value), "bias": Dense(gradient.sum(1))}


def _conv1d(module: nn.Module, value: Tensor, gradient: Tensor) -> dict[str, GradientTerm]:
    value, gradient = _positions(value), _positions(gradient)
    return {"weight": Outer(value, gradient), "bias": Dense(gradient.sum(1))}


def _embedding(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> dict[str, GradientTerm]:
    values = _positions(gradient)
    ids = ids.reshape(len(ids), -1)
    if module.padding_idx is not None:
        values = values.masked_fill((ids == module.padding_idx)[..., None], 0)
    return {"weight": TableGradient(ids, values)}


def _layer_norm(module: nn.LayerNorm, value: Tensor, gradient: Tensor) -> dict[str, GradientTerm]:
    normal = F.layer_norm(value, module.normalized_shape, eps=module.eps)
    return {
        "weight": Dense(_over_positions(normal * gradient, len(module.normalized_shape))),
        "bias": Dense(_over_positions(gradient, len(module.normalized_shape))),
    }


def _convolution(module: nn.Module, value: Tensor, gradient: Tensor) -> dict[str, GradientTerm]:
    written = rows_written(module, gradient)
    return {"weight": Outer(written, rows_read(module, value)), "bias": Dense(written.sum(1))}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.Conv2d: _convolution,
    nn.Conv1d: _convolution,
}


def _positions(value: Tensor) -> Tensor:
    """[N, …, D] as [N, S, D]; [N, D] as [N, 1, D]."""
    return value.reshape(len(value), -1, value.shape[-1])


def _over_positions(value: Tensor, kept: int) -> Tensor:
    """[N, …, *kept] summed to [N, *kept]."""
    between = tuple(range(1, value.dim() - kept))
    return value.sum(between) if between else value
