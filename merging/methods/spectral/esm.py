"""ESM: each member's strongest directions of output on its own data, made orthogonal to those of the others."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.gram_sketch import dense
from merging.methods.latest import Latest
from merging.methods.least_squares.blocks import InBlocks, blocks_of
from merging.methods.least_squares.gram_systems import averaged_layers, grams_of
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.spectral.singular_vectors import NOISE, Matrix, PreparedSpectral, norms, polar, triples
from merging.methods.spherical.inner_products import Products, added, inner_products
from merging.recipe import Value

POWER = 0.15
"""Of a direction's share of the output's energy, in its weight."""
ROUNDING = 2 * torch.finfo(torch.float32).eps
"""Rounding errors of a Gram's entries, relative to its largest."""
KEPT_BYTES = 1 << 30
"""Bytes of members' output directions that are kept for later candidates, at most."""


@register
class Esm(Method):
    """θ_0 + 2 mean σ(U) mean σ(V) polar(U) polar(V) for every matrix with a Gram (Li et al. 2026, essential subspace).

    P_t and λ_t are the eigenvectors and eigenvalues of τ_t G_t τ_tᵀ: directions of what the task vector adds to the outputs
    on the member's own inputs. Of each of T members the first k = out / T enter, weighted by w = λ^0.15 over its mean: side
    by side, U has P_t diag(w) and V has α_t diag(w) P_tᵀ τ_t ‖τ_t‖² / (mean ‖τ‖)². Each column of V is multiplied by the square
    of its norm over the mean norm; with `layers` each matrix, too, by that of ‖Σ τ_t‖ over its mean among the same matrices
    of all layers. (The published norm is that of the merged matrix, which parts of a model that are merged apart cannot
    know.) Directions that no input reaches, or that are rounding, are left out. A factor shared by all members scales the
    result. What has no Gram is the members' mean, θ_0 + Σ α_t τ_t / T.
    """

    name = "esm"
    summary = "strongest output directions of every member on its own data, decorrelated"
    requires = ("gram",)
    flat = True
    scaling = Parameter(1.0, "scale of the member's directions", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "layers": Parameter(
            True,
            "make matrices that moved more than the same ones of other layers stronger, and others weaker",
            choices=(True, False),
        ),
    }

    def global_pass(self, weights: Iterable[Weight]) -> Products:
        """Inner products of the task vectors of every matrix with a Gram."""
        return inner_products(view for w in weights if w.statistics.get("gram") for view in blocks_of(w))

    def combine(self, first: Products | None, second: Products | None) -> Products:
        """All of them."""
        return added(first or {}, second or {})

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Checks all Grams. A member's output directions are computed for the first candidate with it; see `KEPT_BYTES`.

        Raises:
            MethodError: A Gram is missing, not finite, of another shape, or has a negative diagonal.
        """
        products = self.global_pass(weights) if context.global_stats is None else context.global_stats
        return InBlocks(weights, lambda views: PreparedEsm(views, products))


def layer_scales(products: Products, places: Sequence[int]) -> dict[str, float]:
    """Weight → (‖Σ τ_t‖ / mean ‖Σ τ_t‖)² of some members, the mean taken over the same matrix of all layers.

    Args:
        products: Of every matrix of the model.
        places: Where the members are among all.
    """
    kinds: dict[str, dict[str, float]] = {}
    for name in sorted(products):
        total = float(products[name][places][:, places].sum())
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), {})[name] = max(total, 0.0) ** 0.5
    scales = {}
    for sizes in kinds.values():
        mean = sum(sizes.values()) / len(sizes)
        scales.update({name: (size / mean) ** 2 if mean > 0 else 1.0 for name, size in sizes.items()})
    return scales


class PreparedEsm(PreparedSpectral):
    """Base, members and Grams as they are stored.

    Args:
        weights: The weights to merge.
        products: Inner products of the task vectors of every matrix with a Gram of the whole model.
    """

    oriented = True

    def __init__(self, weights: Sequence[Weight], products: Products) -> None:
        super().__init__(weights)
        self._products = products
        self._scales: Latest[dict[str, float]] = Latest()
        # batch and member → its directions and their weights, see `_strongest`
        self._directions: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._kept_bytes = 0

    def matrices(self, weight: Weight) -> list[Matrix]:
        """Those that have Grams."""
        return [Matrix(weight)] if grams_of(weight) and weight.base.numel() else []

    def report(self) -> dict[str, float]:
        """`averaged_layers`."""
        return averaged_layers(self.rest)

    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """2 mean σ(U) mean σ(V) polar(U) polar(V) of every scaling."""
        batch, members = self.batches[index], list(scalings[0])
        lefts, rights, sizes = [], [], []
        for member in members:
            moved = batch.moved({member: 1.0}, self.scratch)
            each = max(moved.shape[1] // len(members), 1)
            left, power = (part[..., :each] for part in self._strongest(index, member, moved))
            mean = power.sum(1) / (power > 0).sum(1).clamp(min=1)
            weight = power / torch.where(mean > 0, mean, 1.0)[:, None]
            lefts.append(left * weight[:, None, :])
            rights.append(weight[:, :, None] * (left.mT @ moved))
            sizes.append(norms(moved))
        mean = torch.stack(sizes).mean(0)
        ratios = [(size / torch.where(mean > 0, mean, 1.0)).square() for size in sizes]
        outputs, strength = polar(torch.cat(lefts, dim=2))
        layers = self._layer_scales(members) if parameters["layers"] else {}
        scale = 2 * strength * strength.new_tensor([layers.get(row.weight.name, 1.0) for row in batch.rows])
        for factors in scalings:
            shares = [factors[member] * ratio[:, None, None] for member, ratio in zip(members, ratios, strict=True)]
            stacked = torch.cat([right * share for right, share in zip(rights, shares, strict=True)], dim=1)
            columns = stacked.square().sum(1).sqrt()
            mean = columns.mean(1, keepdim=True)
            inputs, size = polar(stacked * (columns / torch.where(mean > 0, mean, 1.0)).square()[:, None, :])
            yield outputs @ inputs * (scale * size)[:, None, None]

    def _strongest(self, index: int, member: str, moved: Tensor) -> tuple[Tensor, Tensor]:
        """P_t [B, out, r] and λ_t^0.15 [B, r], 0 where λ_t is; kept as long as there is room: no factor changes them.

        Args:
            index: Of the batch.
            member: Whose.
            moved: Its task vectors [B, out, in].
        """
        if (index, member) in self._directions:
            return self._directions[index, member]
        grams = [dense(row.weight.statistics["gram"][member]).double() for row in self.batches[index].rows]
        left, energies = output_directions(moved, torch.stack(grams))
        strongest = left, energies**POWER
        size = sum(part.nbytes for part in strongest)
        if self._kept_bytes + size <= KEPT_BYTES:
            self._directions[index, member] = strongest
            self._kept_bytes += size
        return strongest

    def _layer_scales(self, members: Sequence[str]) -> dict[str, float]:
        """See `layer_scales`; kept until other members are asked for."""
        places = [self.members.index(member) for member in members]
        return self._scales.get(places, lambda: layer_scales(self._products, places))


def output_directions(moved: Tensor, grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of τ G τᵀ, descending; both are 0 where they are rounding, or no input reaches them.

    Args:
        moved: τ [B, out, in], float64.
        grams: G [B, in, in], float64, summed in float32.

    Returns:
        P [B, out, r] and λ [B, r], r = min(out, in).
    """
    outputs, inputs = moved.shape[1:]
    if outputs > inputs:  # no eigenvectors of the larger side
        left, values, _ = triples(moved @ _root(grams))
        return left, values.square()
    energies, vectors = (part.flip(-1) for part in torch.linalg.eigh(moved @ grams @ moved.mT))
    # an error E of G is one of at most ‖E‖ ‖τᵀ p‖² in pᵀ τ G τᵀ p
    reached = (moved.mT @ vectors).square().sum(1)
    rounding = ROUNDING * inputs**0.5 * norms(grams)[:, None] * reached
    kept = (energies > rounding) & (energies > NOISE**2 * energies[:, :1])
    return vectors * kept[:, None, :], energies * kept


def _root(grams: Tensor) -> Tensor:
    """G^½ [B, n, n]; eigenvalues that a sum in float32 has of rounding alone are 0."""
    values, vectors = torch.linalg.eigh(grams)
    least = ROUNDING * values.shape[1] ** 0.5 * values[:, -1:]
    root: Tensor = (vectors * torch.where(values > least, values, 0.0).sqrt()[:, None, :]) @ vectors.mT
    return root
