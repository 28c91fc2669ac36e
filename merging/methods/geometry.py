"""Inner products of base and task vectors, tensor by tensor: lengths and angles are all that spherical merges need."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.methods.base import Weight
from merging.methods.blocks import Scratch, difference, spans


def inner_products(weights: Sequence[Weight], members: Sequence[str]) -> Mapping[str, Tensor]:
    """For each weight ⟨v_i, v_j⟩ [T + 1, T + 1], float64 on the CPU, with v = τ_1 … τ_T, θ_0 in the order of `members`."""
    scratch = Scratch()
    found = {}
    for weight in weights:
        base = weight.base.reshape(-1)
        products = torch.zeros(len(members) + 1, len(members) + 1, dtype=torch.float64, device=base.device)
        for start, stop in spans(base.numel(), base.device, rows=4 * (len(members) + 1)):
            shape = (len(members) + 1, stop - start)
            rows = scratch.take("rows", *shape, device=base.device)
            for row, member in zip(rows, members, strict=False):
                difference(weight.members[member].reshape(-1)[start:stop], base[start:stop], row)
            rows[-1].copy_(base[start:stop])
            wide = scratch.take("wide", *shape, device=base.device, dtype=torch.float64).copy_(rows)
            products.addmm_(wide, wide.T)
        found[weight.name] = products.cpu()
    return found
