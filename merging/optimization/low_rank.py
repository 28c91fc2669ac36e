"""Low-rank additions to matrices (LoRA, Hu et al. 2021), trained in place of the matrices themselves."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


class LowRank:
    """W + B A for each matrix W [out, in], A [r, in] normal and B [out, r] zero at the start.

    Args:
        weights: All merged weights by name; the matrices are overwritten by `write`.
        names: Those that get an addition; only matrices larger than the rank do.
        rank: r.
        seed: Of A.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Collection[str], rank: int, seed: int) -> None:
        self._weights = weights
        self._start = {n: weights[n].clone() for n in sorted(names) if weights[n].dim() == 2}
        self.factors: dict[str, Tensor] = {}
        """What is trained, by `a:NAME` and `b:NAME`."""
        generator = torch.Generator().manual_seed(seed)
        for name, start in self._start.items():
            size = min(rank, *start.shape)
            random = torch.randn(size, start.shape[1], generator=generator) / start.shape[1] ** 0.5
            self.factors[f"a:{name}"] = random.to(start.device)
            self.factors[f"b:{name}"] = start.new_zeros(start.shape[0], size)

    def gradients(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors' gradients, from those of the matrices: G Aᵀ of B and Bᵀ G of A."""
        gradients = {}
        for name in self._start.keys() & whole.keys():
            gradients[f"a:{name}"] = self.factors[f"b:{name}"].T @ whole[name]
            gradients[f"b:{name}"] = whole[name] @ self.factors[f"a:{name}"].T
        return gradients

    @torch.no_grad()
    def write(self) -> None:
        """Brings the matrices up to date with their factors."""
        for name, start in self._start.items():
            torch.addmm(start, self.factors[f"b:{name}"], self.factors[f"a:{name}"], out=self._weights[name].data)
