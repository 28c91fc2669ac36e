"""Merges that are a weighted sum in every tensor, with weights that follow from lengths and angles."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch, weighted_sum
from merging.methods.averaging.average import shares
from merging.methods.checks import check_weights, chosen, target
from merging.methods.method import Context, Method, Parameter, Prepared, Weight
from merging.methods.spherical.inner_products import Products, added, inner_products
from merging.recipe import Value

PARALLEL = 0.9995
"""|cos| above which an arc is taken for a line."""


class PreparedSpherical(Prepared):
    """Base and members as they are stored, and the inner products of each tensor.

    Args:
        weights: The weights to merge.
        products: Inner products of at least these weights.
        method: Says what the coefficients are.
    """

    def __init__(self, weights: Sequence[Weight], products: Products, method: "Spherical") -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._products = products
        self._method = method
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and members."""
        members = chosen(scaling, self._members)
        share = torch.tensor(list(shares(scaling, members).values()), dtype=torch.float64)
        places = [*(self._members.index(member) for member in members), len(self._members)]
        for weight in self._weights:
            products = self._products[weight.name][places][:, places]
            factors = self._method.coefficients(products, share, parameters).tolist()
            values = [*(weight.members[member] for member in members), weight.base]
            weighted_sum(list(zip(values, factors, strict=True)), target(out, weight), self._scratch)


class Spherical(Method):
    """Σ c_t θ_t + c_0 θ_0, with numbers c of every tensor's own."""

    scaling = Parameter(1.0, "relative weight; normalised to sum 1", low=0.0, high=1.0)
    scale_free = True
    elementwise = True

    def survey(self, weights: Iterable[Weight]) -> Products:
        """All inner products of base and task vectors."""
        return inner_products(weights)

    def combine(self, first: Products | None, second: Products | None) -> Products:
        """The sum, weight by weight."""
        return added(first or {}, second or {})

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, in their stored dtype."""
        return PreparedSpherical(weights, self.survey(weights) if context.survey is None else context.survey, self)

    @abstractmethod
    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """What a tensor's members and base are multiplied by.

        Args:
            products: Inner products of τ_1 … τ_T, θ_0 [T + 1, T + 1], float64.
            shares: The members' weights [T], sum 1, float64.
            parameters: The method's.

        Returns:
            c_1 … c_T, c_0, float64.
        """


def around_base(factors: Tensor) -> Tensor:
    """Coefficients of θ_1 … θ_T, θ_0 from those of τ_1 … τ_T."""
    rest = 1.0 - factors.sum()
    return torch.cat([factors, torch.where(rest.abs() > 1e-12, rest, 0.0)[None]])
