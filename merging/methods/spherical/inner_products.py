"""Inner products of base and task vectors, tensor by tensor: lengths and angles are all that spherical merges need."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.kernels.blockwise import Scratch, difference, spans
from merging.methods.method import Weight

Products = Mapping[str, Tensor]
"""For each weight ⟨v_i, v_j⟩ [T + 1, T + 1], float64 on the CPU, v = τ_1 … τ_T, θ_0 in the order of the members' names."""


def inner_products(weights: Iterable[Weight]) -> Products:
    """Inner products of base and task vectors of whole weights, or of stretches of them.

    Some ten thousand float32 products are summed in float32, and these sums in float64: as exact as the task vectors, at a
    third of the cost of float64 throughout.
    """
    scratch = Scratch()
    found: dict[str, Tensor] = {}
    for weight in weights:
        base = weight.base.reshape(-1)
        values = [weight.members[member].reshape(-1) for member in sorted(weight.members)]
        if cpu.fits(base, *values):
            found[weight.name] = cpu.products(base, values)
            continue
        products = torch.zeros(len(values) + 1, len(values) + 1, dtype=torch.float64, device=base.device)
        for start, stop in spans(base.numel(), base.device, rows=4 * (len(values) + 1)):
            rows = scratch.take("rows", len(values) + 1, stop - start, device=base.device)
            origin = rows[-1].copy_(base[start:stop])
            for row, value in zip(rows, values, strict=False):
                difference(value[start:stop], origin, row)
            products.add_(rows @ rows.T)
        found[weight.name] = products.cpu()
    return found


def added(first: Products, second: Products) -> Products:
    """Inner products over two disjoint sets of entries: those of one weight add up."""
    both = {name: first[name] + second[name] for name in first.keys() & second.keys()}
    return {**first, **second, **both}
