"""Merges that are a weighted sum in every tensor, or in every row of one, with weights that follow from lengths and angles."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch, blocks_of_rows, flat, weighted_sum
from merging.methods.averaging.average import shares
from merging.methods.checks import check_weights, chosen, target
from merging.methods.method import Context, Method, Parameter, Prepared, Weight
from merging.methods.spherical.inner_products import (
    Products,
    added,
    as_rows,
    inner_products,
    row_products,
)
from merging.recipe import Value

PARALLEL = 0.9995
"""|cos| above which an arc is taken for a line."""
OVER = Parameter(
    "tensor",
    "what has an angle of its own: a whole tensor, each row of a matrix (the weights of one output), or each column",
    choices=("tensor", "rows", "columns"),
    search=False,
)


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
        self._of_rows: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and members."""
        members = chosen(scaling, self._members)
        share = torch.tensor(list(shares(scaling, members).values()), dtype=torch.float64)
        places = [*(self._members.index(member) for member in members), len(self._members)]
        over = str(parameters.get("over", "tensor"))
        for weight in self._weights:
            values = [*(weight.members[member] for member in members), weight.base]
            destination = target(out, weight)
            if over == "tensor" or weight.base.dim() < 2:
                products = self._products[weight.name][places][:, places]
                factors = self._method.coefficients(products, share, parameters).tolist()
                weighted_sum(list(zip(values, factors, strict=True)), destination, self._scratch)
                continue
            products = self._by_rows(weight, over)[:, places][:, :, places]
            self._sum_rows(weight, over, values, self._method.coefficients(products, share, parameters), destination)

    def _by_rows(self, weight: Weight, over: str) -> Tensor:
        """Inner products of a weight's rows or columns, computed when first asked for."""
        if (weight.name, over) not in self._of_rows:
            self._of_rows[weight.name, over] = row_products(weight, over, self._scratch)
        return self._of_rows[weight.name, over]

    def _sum_rows(
        self, weight: Weight, over: str, values: Sequence[Tensor], factors: Tensor, destination: Tensor
    ) -> None:
        """Writes Σ c_i x_i with coefficients [rows, T + 1] of every row's own."""
        factors = factors.to(dtype=torch.float32, device=weight.base.device)
        turn = partial(as_rows, over=over, transposed=weight.transposed)
        with flat(destination) as written:
            whole = turn(written.view(destination.shape))
            terms = [turn(value) for value in values]
            for start, stop in blocks_of_rows(whole, 2):
                total = self._scratch.take("total", stop - start, whole.shape[1], device=whole.device).zero_()
                for term, factor in zip(terms, factors.unbind(1), strict=True):
                    total.addcmul_(term[start:stop].float(), factor[start:stop, None])
                whole[start:stop] = total


class Spherical(Method):
    """Σ c_t θ_t + c_0 θ_0, with numbers c of every tensor's own."""

    scaling = Parameter(1.0, "relative weight; normalised to sum 1", low=0.0, high=1.0)
    scale_free = True
    elementwise = True

    def is_elementwise(self, parameters: Mapping[str, Value]) -> bool:
        """Unless rows have angles of their own."""
        return parameters.get("over", "tensor") == "tensor"

    def global_pass(self, weights: Iterable[Weight]) -> Products:
        """All inner products of base and task vectors."""
        return inner_products(weights)

    def combine(self, first: Products | None, second: Products | None) -> Products:
        """The sum, weight by weight."""
        return added(first or {}, second or {})

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, in their stored dtype."""
        return PreparedSpherical(
            weights, self.global_pass(weights) if context.global_stats is None else context.global_stats, self
        )

    @abstractmethod
    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """What a tensor's, or each of its rows', members and base are multiplied by.

        Args:
            products: Inner products of τ_1 … τ_T, θ_0 [T + 1, T + 1] or, of rows, [rows, T + 1, T + 1], float64.
            shares: The members' weights [T], sum 1, float64.
            parameters: The method's.

        Returns:
            c_1 … c_T, c_0 [T + 1] or [rows, T + 1], float64.
        """


def around_base(factors: Tensor) -> Tensor:
    """Coefficients of θ_1 … θ_T, θ_0 [..., T + 1] from those of τ_1 … τ_T [..., T]."""
    rest = 1.0 - factors.sum(-1, keepdim=True)
    return torch.cat([factors, torch.where(rest.abs() > 1e-12, rest, 0.0)], dim=-1)


def of_weights(products: Tensor) -> Tensor:
    """Inner products of θ_1 … θ_T, θ_0 from those of τ_1 … τ_T, θ_0."""
    turn = torch.eye(products.shape[-1], dtype=torch.float64)
    turn[:, -1] = 1.0
    return turn @ products @ turn.T
