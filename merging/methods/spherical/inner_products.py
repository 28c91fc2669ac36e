"""Inner products of base and task vectors, tensor by tensor: lengths and angles are all that spherical merges need."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.kernels.blockwise import Scratch, blocks_of_rows, difference, spans
from merging.methods.method import Weight

Products = Mapping[str, Tensor]
"""For each weight ⟨v_i, v_j⟩ [T + 1, T + 1], float64 on the CPU, v = τ_1 … τ_T, θ_0 in the order of the members' names."""


def inner_products(weights: Iterable[Weight]) -> Products:
    """Inner products of base and task vectors of whole weights, or of chunks of them.

    Some ten thousand float32 products are summed in float32, and these sums in float64: as exact as the task vectors, at a
    third of the cost of float64 throughout.
    """
    scratch = Scratch()
    by_weight: dict[str, Tensor] = {}
    for weight in weights:
        base = weight.base.reshape(-1)
        values = [weight.members[member].reshape(-1) for member in sorted(weight.members)]
        if cpu.fits(base, *values) and (compiled := cpu.products(base, values)) is not None:
            by_weight[weight.name] = compiled
            continue
        products = torch.zeros(len(values) + 1, len(values) + 1, dtype=torch.float64, device=base.device)
        for start, stop in spans(base.numel(), base.device, rows=4 * (len(values) + 1)):
            rows = scratch.take("rows", len(values) + 1, stop - start, device=base.device)
            origin = rows[-1].copy_(base[start:stop])
            for row, value in zip(rows, values, strict=False):
                difference(value[start:stop], origin, row)
            products.add_(rows @ rows.T)
        by_weight[weight.name] = products.cpu()
    return by_weight


def as_rows(value: Tensor, over: str, transposed: bool) -> Tensor:
    """A weight of two dimensions or more as a matrix of its rows (the weights of one output) or columns, without a copy.

    Args:
        value: [out, in], or [in, out] if `transposed`; further dimensions count as inputs.
        over: `rows` or `columns`.
        transposed: See `Weight`.
    """
    matrix = value.flatten(1)
    return matrix.T if transposed != (over == "columns") else matrix


def row_products(weight: Weight, over: str, scratch: Scratch) -> Tensor:
    """Inner products of base and task vectors in every row or column of a weight [rows, T + 1, T + 1], float64 on the CPU."""
    base = as_rows(weight.base, over, weight.transposed)
    values = [as_rows(weight.members[member], over, weight.transposed) for member in sorted(weight.members)]
    products = torch.empty(base.shape[0], len(values) + 1, len(values) + 1, dtype=torch.float64)
    for start, stop in blocks_of_rows(base, 4 * (len(values) + 1)):
        rows = scratch.take("rows", stop - start, len(values) + 1, base.shape[1], device=base.device)
        origin = rows[:, -1].copy_(base[start:stop])
        for place, value in enumerate(values):
            difference(value[start:stop], origin, rows[:, place])
        products[start:stop] = rows @ rows.mT
    return products


def added(first: Products, second: Products) -> Products:
    """Inner products over two disjoint sets of entries: those of one weight add up."""
    both = {name: first[name] + second[name] for name in first.keys() & second.keys()}
    return {**first, **second, **both}
