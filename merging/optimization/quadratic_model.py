"""What statistics predict of a merge without running it: every member's loss as a quadratic form in the scaling factors.

Around its own weights a member's loss grows as ½ (θ − θ_t)ᵀ H_t (θ − θ_t), H_t its Fisher, or the curvature that Gram and
output Gram stand for. Where θ is θ_0 + Σ α_s u_s, that is a polynomial of second degree in α: a T × T form for each group of
weights that has factors of its own, worth microseconds. It follows the loss of merged models well and their accuracy badly:
a guide, and no judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.gram_sketch import dense
from merging.mergers.linear_basis import Basis
from merging.mergers.material import Material
from merging.methods.least_squares.blocks import blocks_of
from merging.methods.method import Weight

Array = npt.NDArray[np.float64]
CURVATURES = ("fisher", "gram")
"""Kinds of statistic that stand for a member's curvature, the better one first."""


@dataclass(frozen=True)
class Quadratic:
    """½ Σ_g (α_gᵀ A_g α_g − 2 b_gᵀ α_g + c_g): how far a member's loss lies above its own minimum.

    Args:
        curvature: A [G, T, T], float64.
        pull: b [G, T].
        constant: c [G].
    """

    curvature: Array
    pull: Array
    constant: Array

    def __call__(self, factors: Array) -> float:
        """The predicted excess of the loss at scaling factors [G, T]."""
        quadratic = np.einsum("gs,gsr,gr->", factors, self.curvature, factors)
        return float(0.5 * (quadratic - 2.0 * (self.pull * factors).sum() + self.constant.sum()))

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        return {name: getattr(self, name).tolist() for name in ("curvature", "pull", "constant")}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Quadratic":
        """From what `as_dict` gave."""
        return cls(*(np.array(value[name], dtype=np.float64) for name in ("curvature", "pull", "constant")))


def quadratics(material: Material, basis: Basis, groups: Sequence[Sequence[str]], kind: str) -> dict[str, Quadratic]:
    """Every member's quadratic loss over the scaling factors of a linear method.

    Args:
        material: Pool and statistics; every member of the basis needs the statistic `kind` of its own.
        basis: u_t of the method.
        groups: Weights that share a member's factor, group by group; together all weights, each once.
        kind: `fisher` (diagonal), or `gram` (with `output_gram` where that is there, K-FAC). Weights that have no such
            statistic take no part.

    Returns:
        Member → form over [G, T], T in the order of `basis.members`.

    Raises:
        MethodError: A member lacks the statistic.
    """
    by_member = material.statistics.get(kind, {})
    if missing := [member for member in basis.members if member not in by_member]:
        raise MethodError(f"the quadratic model needs the statistic '{kind}' of {', '.join(missing)}")
    count = len(basis.members)
    forms = {
        member: Quadratic(np.zeros((len(groups), count, count)), np.zeros((len(groups), count)), np.zeros(len(groups)))
        for member in basis.members
    }
    device = next(iter(basis.vectors.values())).device
    for number, group in enumerate(groups):
        for weight in material.weights(group, (kind, "output_gram"), device):
            statistics = weight.statistics.get(kind, {})
            moves = basis.vectors[weight.name].to(torch.float32).flatten(1)
            for member, curvature in statistics.items():
                if member not in forms:
                    continue
                own = (weight.members[member].to(torch.float32) - weight.base.to(torch.float32)).reshape(1, -1)
                output = weight.statistics.get("output_gram", {}).get(member)
                everything = torch.cat([moves, own])
                if kind == "fisher":
                    bent = everything * curvature.to(torch.float32).reshape(1, -1)
                elif output is None and "output_gram" in material.statistics:
                    continue  # of another scale than the weights that have both factors
                else:
                    bent = _bend(everything, curvature, output, weight)
                products = (everything @ bent.T).double().cpu().numpy()
                form = forms[member]
                form.curvature[number] += products[:count, :count]
                form.pull[number] += products[:count, count]
                form.constant[number] += products[count, count]
    return forms


def minimiser(forms: Sequence[Quadratic], *, shared: bool = False, ridge: float = 1e-6) -> Array:
    """Scaling factors [G, T] that minimise the sum of quadratic losses.

    Args:
        forms: One a task.
        shared: One factor for all members and groups.
        ridge: Share of the mean curvature that is added, with a pull toward 1, where the sum says nothing.
    """
    curvature = np.sum([form.curvature for form in forms], axis=0)
    curvature = (curvature + curvature.swapaxes(1, 2)) / 2
    pull = np.sum([form.pull for form in forms], axis=0)
    groups, members = pull.shape
    if shared:
        return np.full((groups, members), pull.sum() / max(float(curvature.sum()), np.finfo(float).tiny))
    floor = ridge * curvature.trace(axis1=1, axis2=2) / members + np.finfo(float).tiny
    system = curvature + floor[:, None, None] * np.eye(members)
    return np.linalg.solve(system, (pull + floor[:, None])[..., None])[..., 0]


def _bend(moves: Tensor, gram: Tensor, output: Tensor | None, weight: Weight) -> Tensor:
    """B V A for every row V of [N, weight's entries], A the Gram of inputs, B that of output gradients or the identity."""
    first = blocks_of(weight)[0].base  # a convolution's groups, or experts, are matrices each
    matrices = moves.view(len(moves), -1, *first.shape)
    gram = dense(gram).to(torch.float32)
    if weight.transposed:
        bent = gram @ matrices
        bent = bent if output is None else bent @ output.to(torch.float32)
    else:
        bent = matrices @ gram
        bent = bent if output is None else output.to(torch.float32) @ bent
    return bent.reshape(len(moves), -1)
