"""Core space: LoRA adapters merged, by any method, in the few dimensions that their factors span."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch, weighted_sum
from merging.kernels.gram_sketch import dense
from merging.methods.checks import check_weights, chosen, target
from merging.methods.lines import Lines
from merging.methods.method import Context, Method, Prepared, Weight, modifier
from merging.methods.modified import Modified, modify
from merging.recipe import Value

SPANNED = 1e-13
"""Eigenvalues of the factors' Gram matrices (float64) below this share of the largest are rounding."""


class CoreSpace(Modified):
    """θ_0 + U_B M V_Aᵀ for every matrix that is adapted, M the merge by another method of M_t = U_Bᵀ B_t A_t V_A.

    Panariello et al. 2025. U_B and V_A are orthonormal bases, by singular values, of what the factors B_t (with their scalings)
    and A_t of all members of a candidate span: nothing is lost, ranks may differ, and a method works on [Σ r_t, Σ r_t]. In core
    space θ_0 is 0: what a method takes of weights it takes of task vectors. Weights that a member holds in full are merged as
    the method merges them; those that no adapter touches stay the base's.
    """

    def is_elementwise(self, parameters: Mapping[str, Value]) -> bool:
        """Never: an entry is a product of factors."""
        return False

    def global_pass(self, weights: Iterable[Weight]) -> "FactorStatistics":
        """Gram matrices of all members' factors, from which any subset's cores follow."""
        return FactorStatistics({weight.name: _grams(weight) for weight in weights if _has_factors(weight)})

    def sample(self, weights: Iterable[Weight], parameters: Mapping[str, Value]) -> "FactorStatistics":
        """The global pass."""
        return self.global_pass(weights)

    def combine(self, first: "FactorStatistics | None", second: "FactorStatistics | None") -> "FactorStatistics":
        """Those of all weights."""
        return FactorStatistics({**(first.grams if first else {}), **(second.grams if second else {})})

    def second_pass(self, weights: Iterable[Weight], global_stats: Any, parameters: Mapping[str, Value]) -> None:
        """Nothing: all cores of the model are small, and whoever merges a part of it has them all."""
        return

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references; what depends on the subset alone is kept for the latest one.

        Raises:
            MethodError: The method looks at the whole model at once, and a member holds a weight in full.
        """
        global_stats = self.global_pass(weights) if context.global_stats is None else context.global_stats
        return PreparedCore(weights, self.inner, global_stats, context)


@modifier("core")
def core(inner: Method) -> Method:
    """A method that merges adapters in the space of their factors.

    Raises:
        MethodError: The method needs statistics that belong to whole weights, or depends on the signs of the bases' vectors.
    """
    if inner.solution is not None or set(inner.kinds) - {"gram"}:
        kinds = ", ".join(kind for kind in inner.kinds if kind != "gram")
        raise MethodError(f"'{inner.name}' uses {kinds} of whole weights, which core space lacks: leave out 'core+'")
    if inner.signed:
        raise MethodError(
            f"'{inner.name}' takes means or a softmax of rows, which depend on signs, and those of core space's bases are "
            "arbitrary: leave out 'core+'"
        )
    extras = tuple(dict.fromkeys((*inner.extras, "layout", "factors")))
    summary = f"{inner.summary}, in the space of the adapters' factors"
    return modify(CoreSpace, "core", inner, summary, {}, elementwise=False, extras=extras)


@dataclass(frozen=True)
class FactorGrams:
    """What is known of a weight's factors: τ_t = L_t @ R_t as it is stored, members' columns and rows side by side.

    Args:
        ranks: Member → r_t, in the order of the columns.
        left: LᵀL [Σ r_t, Σ r_t], float64.
        right: R Rᵀ.
        transposed: The weight is stored [in, out].
        inputs: Member → the Gram of its inputs between the factors that read them.
    """

    ranks: Mapping[str, int]
    left: Tensor
    right: Tensor
    transposed: bool
    inputs: Mapping[str, Tensor]

    def columns(self, members: Sequence[str]) -> Tensor:
        """Where the columns of some members are."""
        places, start = [], 0
        for member, rank in self.ranks.items():
            places += list(range(start, start + rank)) if member in members else []
            start += rank
        return torch.tensor(places, dtype=torch.long)


@dataclass(frozen=True)
class FactorStatistics:
    """Weight → Gram matrices of its factors, of every weight that no member holds in full."""

    grams: Mapping[str, FactorGrams]


@dataclass(frozen=True)
class Core:
    """A weight in core space.

    Args:
        weight: The members' cores [R_out, R_in], on a base of 0.
        left: L @ `left` is an orthonormal basis of what L spans, [Σ r_t, R].
        right: `right` @ R is one of what R spans, [R, Σ r_t].
    """

    weight: Weight
    left: Tensor
    right: Tensor


@dataclass
class Subset:
    """What is kept for some members.

    Args:
        members: The members.
        prepared: The method's state, of all cores of the model and of the part's own weights that are held in full.
        shapes: Core's name → its shape [R_out, R_in].
        bases: Name → orthonormal bases of the part's own weights [rows, R] and [R, columns], float32.
    """

    members: tuple[str, ...]
    prepared: Prepared | None
    shapes: Mapping[str, torch.Size]
    bases: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class PreparedCore(Prepared):
    """Base and factors, and Gram matrices of the whole model's factors.

    Args:
        weights: The weights to merge.
        inner: The method that merges cores.
        global_stats: Of the whole model.
        context: What else is known of it.
    """

    def __init__(
        self, weights: Sequence[Weight], inner: Method, global_stats: FactorStatistics, context: Context
    ) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._inner = inner
        self._global_stats = global_stats
        self._context = replace(context, global_stats=None)
        self._scratch = Scratch()
        self._whole = [weight for weight in weights if not _has_factors(weight)]
        self._kept: Subset | None = None
        if self._whole and _looks_at_all(inner):
            name = self._whole[0].name
            holders = [member for member in self._members if member not in self._whole[0].factors]
            raise MethodError(
                f"'core+{inner.name}' looks at all cores at once, and {holders[0]} holds '{name}' in full: merge by a method "
                f"that takes every weight for itself (core+tsv_m, core+task_arithmetic), or in full space ('{inner.name}')"
            )

    def report(self) -> dict[str, float]:
        """The figures of the method on the cores."""
        return self._kept.prepared.report() if self._kept and self._kept.prepared else {}

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Merges all cores of the model, and expands those of its own weights."""
        members = chosen(scaling, self._members)
        destinations = {weight.name: target(out, weight) for weight in self._weights}
        subset = self._subset(members)
        device = next(iter(destinations.values())).device
        cores = {name: torch.empty(shape, device=device) for name, shape in subset.shapes.items()}
        if subset.prepared is not None:
            whole = {weight.name: destinations[weight.name] for weight in self._whole}
            subset.prepared.merge(scaling, parameters, cores | whole)
        for weight in self._weights:
            if weight.name in subset.bases:
                left, right = subset.bases[weight.name]
                moved = cores[weight.name]
                step = left @ (moved.mT if weight.transposed else moved) @ right
                weighted_sum([(weight.base, 1.0), (step, 1.0)], destinations[weight.name], self._scratch)
            elif _has_factors(weight):  # no adapter touches it
                destinations[weight.name].copy_(weight.base)

    def _subset(self, members: tuple[str, ...]) -> Subset:
        """What depends on the members alone; kept until others are asked for."""
        if self._kept is not None and self._kept.members == members:
            return self._kept
        self._kept = None  # before the new one takes memory
        device = self._weights[0].base.device
        of_weight = {name: _core(name, grams, members, device) for name, grams in self._global_stats.grams.items()}
        cores = {name: one for name, one in of_weight.items() if one is not None}
        bases = {}
        for weight in self._weights:
            if weight.name in cores:
                left = torch.cat([weight.factors[member][0].double() for member in members], dim=1)
                right = torch.cat([weight.factors[member][1].double() for member in members])
                core = cores[weight.name]
                bases[weight.name] = ((left @ core.left).float(), (core.right @ right).float())
        whole = [replace(w, members={member: w.members[member] for member in members}) for w in self._whole]
        every = [*(core.weight for core in cores.values()), *whole]
        prepared = self._inner.prepare(every, self._context) if every else None
        shapes = {name: core.weight.base.shape for name, core in cores.items()}
        self._kept = Subset(members, prepared, shapes, bases)
        return self._kept


def _has_factors(weight: Weight) -> bool:
    """Whether every member's task vector is a product of factors, or 0."""
    return weight.members.keys() <= weight.factors.keys()


def _looks_at_all(method: Method) -> bool:
    """Whether a method must have looked at all weights before any is merged, but for counting layers."""
    if isinstance(method, Modified) and type(method).global_pass in (Modified.global_pass, Lines.global_pass):
        return _looks_at_all(method.inner)
    return type(method).global_pass is not Method.global_pass


def _grams(weight: Weight) -> FactorGrams:
    """Gram matrices of a weight's factors, on the CPU."""
    members = sorted(weight.members)
    ranks = {member: weight.factors[member][1].shape[0] for member in members}
    left = torch.cat([weight.factors[member][0].double() for member in members], dim=1)
    right = torch.cat([weight.factors[member][1].double() for member in members])
    reading = left if weight.transposed else right.mT
    grams = weight.statistics.get("gram", {}) if sum(ranks.values()) else {}
    inputs = {m: (reading.mT @ dense(grams[m]).double() @ reading).cpu() for m in members if m in grams}
    return FactorGrams(ranks, (left.mT @ left).cpu(), (right @ right.mT).cpu(), weight.transposed, inputs)


def _core(name: str, grams: FactorGrams, members: Sequence[str], device: torch.device) -> Core | None:
    """A weight in the core space of some members; None where none of them moves it."""
    columns = grams.columns(members)
    left, right = (_basis(part[columns][:, columns]) for part in (grams.left, grams.right))
    if not left.shape[1] or not right.shape[1]:
        return None
    moved = {}
    for member in members:
        own = grams.columns([member])
        product = left.mT @ grams.left[columns][:, own] @ grams.right[own][:, columns] @ right
        moved[member] = (product.mT if grams.transposed else product).float().to(device)
    inputs = left if grams.transposed else right
    statistics = {m: (inputs.mT @ grams.inputs[m][columns][:, columns] @ inputs).to(device) for m in grams.inputs}
    given = {"gram": {m: value for m, value in statistics.items() if m in members}} if statistics else {}
    weight = Weight(name, torch.zeros_like(moved[members[0]]), moved, given)
    return Core(weight, left.to(device), right.mT.to(device))


def _basis(gram: Tensor) -> Tensor:
    """C [n, R] with F @ C orthonormal, by singular values of F, of the Gram matrix FᵀF [n, n]."""
    if not len(gram):
        return gram
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > SPANNED * values[0]
    basis: Tensor = vectors[:, kept] * values[kept].rsqrt()
    return basis
