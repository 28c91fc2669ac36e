"""Model Stock: the members' mean, drawn towards the base the more their task vectors disagree."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from merging.methods.method import Parameter, register
from merging.methods.spherical.interpolation import OVER, Spherical, around_base
from merging.recipe import Value


@register
class ModelStock(Spherical):
    """t · mean + (1 − t) θ_0 in every tensor, t = T c / (1 + (T − 1) c) (Jang et al. 2024, equation 2).

    c is the mean cosine between task vectors, taken for 0 where it is negative. `over` = `rows` gives every row of a matrix
    a t of its own (the paper's and mergekit's filter-wise merge).
    """

    name = "model_stock"
    summary = "mean drawn towards the base where members disagree"
    extras = ("layout",)
    parameters: ClassVar[Mapping[str, Parameter]] = {"over": OVER}

    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """Of the mean, by how parallel the task vectors are."""
        count = len(shares)
        if count == 1:
            return around_base(shares.expand(*products.shape[:-2], 1))
        squares = products.diagonal(dim1=-2, dim2=-1)[..., :-1]
        lengths = squares.clamp(min=0).sqrt().clamp(min=1e-300)
        cosines = products[..., :-1, :-1] / lengths[..., None, :] / lengths[..., None]
        off = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
        mean = (off / (count * (count - 1))).clamp(0, 1)[..., None]
        return around_base(shares * count * mean / (1 + (count - 1) * mean))
