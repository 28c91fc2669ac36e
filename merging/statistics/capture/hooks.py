"""How a model is made to show the gradients of its layers' outputs, and put back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten


def without_cache(model: nn.Module) -> list[Any]:
    """Tells a model not to keep the keys and values that only generation needs.

    Returns:
        The configurations that were changed.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    return caching


@contextmanager
def differentiable(model: nn.Module, *, parameters: bool) -> Iterator[None]:
    """Within it, gradients are recorded, parameters take part as told, and no keys and values are cached."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    caching = without_cache(model)
    model.requires_grad_(parameters)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for config in caching:
            config.use_cache = True


def expand(output: Any, examples: int) -> tuple[Any, list[Tensor]]:
    """A module's output with its broadcast gradient-carrying tensors expanded to all examples, and those."""
    leaves, spec = tree_flatten(output)
    expanded = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim() > 1 and len(leaf) == 1 < examples:
            leaves[place] = leaf.expand(examples, *leaf.shape[1:])
            expanded.append(leaves[place])
    return tree_unflatten(leaves, spec), expanded


def tap(output: Any, examples: int) -> tuple[Any, list[GradientEdge | None]]:
    """A module's output, carrying gradients with one row an example, and where to take each leaf's."""
    leaves, spec = tree_flatten(output)
    edges: list[GradientEdge | None] = [None] * len(leaves)
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() == 0:
            continue
        if leaf.dim() > 1 and len(leaf) == 1 < examples:
            leaf = leaf.expand(examples, *leaf.shape[1:])
        start = leaf if leaf.requires_grad else leaf.detach().requires_grad_()
        # An edge, not the tensor, which what follows may change in place (a leaf it may not: hence a clone).
        edges[place] = get_gradient_edge(start)
        leaves[place] = start if leaf.requires_grad else start.clone()
    return tree_unflatten(leaves, spec), edges
