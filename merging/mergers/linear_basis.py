"""Merges that are linear in their scaling factors: θ = θ_0 + Σ α_t u_t."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.recipe import Recipe, Value


@dataclass(frozen=True)
class Basis:
    """What each member adds to the base at a scaling factor of 1, whatever the other factors are.

    Args:
        members: The members, sorted.
        vectors: Weight → u_t of every member [T, *shape], float32.
    """

    members: tuple[str, ...]
    vectors: Mapping[str, Tensor]


def is_linear(recipe: Recipe) -> bool:
    """Whether a recipe's merged weights are θ_0 + Σ α_t u_t with u_t that don't depend on α."""
    return recipe.method in METHODS and METHODS[recipe.method].is_linear(recipe.parameters)


def compute_basis(
    material: Material,
    method: str,
    members: Sequence[str],
    parameters: Mapping[str, Value],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Basis:
    """Finds u_t = θ(α = e_t) − θ_0 by merging with one factor of 1 after the other.

    Args:
        material: Pool and statistics.
        method: A method that is linear with these parameters.
        members: Who takes part.
        parameters: The method's parameters.
        device: Where the basis lies: T × parameters.
        dtype: What the basis is kept in.

    Raises:
        MethodError: The method is not linear in its scaling factors.
    """
    names = tuple(sorted(members))
    one = Recipe(method, dict.fromkeys(names, 1.0), dict(parameters))
    if not is_linear(one):
        linear = ", ".join(name for name in METHODS if is_linear(METHODS[name].default_recipe(names)))
        raise MethodError(
            f"'{method}' with {dict(parameters) or 'its defaults'} is not linear in its scaling factors, so that it has no "
            f"basis. Linear at their defaults are {linear}"
        )
    pool = material.pool
    out = {name: torch.empty(info.shape, device=device) for name, info in pool.weights.items()}
    merger = ResidentMerger(material, out)
    vectors = {
        name: torch.empty(len(names), *info.shape, device=device, dtype=dtype) for name, info in pool.weights.items()
    }
    for index, member in enumerate(names):
        merger.merge(Recipe(method, {name: float(name == member) for name in names}, dict(parameters)))
        pool.base.prefetch(out)
        for name, value in out.items():
            vectors[name][index] = value - pool.base_weight(name).to(device=device, dtype=torch.float32)
    return Basis(names, vectors)
