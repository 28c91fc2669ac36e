"""What a merge of mergekit's is here: a method, its factors and its parameters.

Defaults that differ from ours are spelled out, so that results agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.config.mergekit.diagnostics import Diagnostics
from flows.config.mergekit.grammar import Model
from flows.config.mergekit.methods import METHODS
from flows.config.mergekit.weights import Resolved
from merging.methods.mergekit_names import MERGEKIT_NAMES
from merging.recipe import GROUP, Value


@dataclass(frozen=True)
class Merge:
    """What the merge of one weight, or of many, is here.

    Args:
        method: Our method.
        factors: One per member.
        parameters: The method's parameters that are written down, in order.
    """

    method: str
    factors: tuple[float, ...]
    parameters: tuple[tuple[str, Value], ...] = ()


def merge_of(
    method: str,
    shared: Resolved,
    own: Sequence[Resolved],
    members: dict[Model, str],
    base: Model | None,
    diagnostics: Diagnostics,
) -> Merge:
    """The merge of one weight.

    Args:
        method: mergekit's method.
        shared: The weight's parameters of the whole merge.
        own: Those of every member.
        members: The models that are merged, and their names in the recipe.
        base: The base, if one is named.
        diagnostics: Gets what cannot be expressed, and where results differ.
    """
    if "density" in METHODS[method].own:
        return _sum(method, shared, own, list(members.values()), diagnostics)
    weights = tuple(one.get("weight", 1.0) for one in own)
    match method:
        case "linear":
            return Merge("linear", weights, (("normalize", shared["normalize"]),))
        case "slerp":
            t = shared["t"]
            return Merge("slerp", tuple(1 - t if model == base else t for model in members), (("space", "weights"),))
        case "nuslerp":
            over = "tensor" if shared["nuslerp_flatten"] else "columns" if shared["nuslerp_row_wise"] else "rows"
            return Merge("nuslerp", weights, (("space", "task_vectors" if base else "weights"), ("over", over)))
        case "karcher":
            diagnostics.note("the Karcher mean is iterated to convergence: `max_iter` and `tol` are left out")
            return Merge("karcher", weights)
        case "multislerp":
            if not shared["normalize_weights"] and abs(sum(weights) - 1) > 1e-6:
                diagnostics.problem(
                    "parameters.normalize_weights", "weights always sum to 1 here: scale them so, or leave it out"
                )
            diagnostics.note(
                "multislerp is the Karcher mean, iterated to convergence, of which mergekit takes one step"
            )
            return Merge("multi_slerp" if base else "karcher", weights)
        case "sce":
            return Merge("sce", weights, (("select", shared["select_topk"]),))
        case "ram" | "ramplus_tl":
            return Merge(MERGEKIT_NAMES.get(method, (method, {}))[0], weights, tuple(sorted(shared.items())))
        case "nearswap" | "arcee_fusion":
            return Merge(method, weights, tuple(shared.items()))
    wise: tuple[tuple[str, Value], ...] = (("over", "rows"),) if shared["filter_wise"] else ()
    return Merge("model_stock", weights, wise)


def _sum(
    method: str, shared: Resolved, own: Sequence[Resolved], members: Sequence[str], diagnostics: Diagnostics
) -> Merge:
    """A sum of task vectors, thinned or not, of all entries or of those that agree."""
    sparse, elects = METHODS[method].sparse, METHODS[method].elects
    weights = tuple(one["weight"] for one in own)
    densities = [min(one["density"], 1.0) for one in own]
    if elects and shared["normalize"] and min(weights) < 0:
        diagnostics.note(
            f"{method} with negative weights: the sum of what agrees is divided by that of its weights' magnitudes here, in "
            "mergekit by that of the weights themselves, which may cancel or turn it round"
        )
    whole = sparse is None or min(densities) >= 1  # mergekit then thins nothing
    if shared["rescale"] and not whole and sparse in ("magnitude", "outliers"):
        diagnostics.problem(
            "parameters.rescale", f"{method} does not rescale to the L1 norm: raise the weights instead"
        )
    if elects and (whole or sparse == "magnitude"):
        agree = "mean" if shared["normalize"] else "sum"
        end = (("lambda", shared["lambda"]), ("trim", "tensor"), ("disjoint", agree))
        return Merge("ties", weights, (*_per_member("density", densities, members), *end))
    mean = elects and shared["normalize"]
    scale = 1.0 if mean else shared["lambda"]
    if not elects and shared["normalize"]:
        total = sum(weights)
        scale /= total if abs(total) >= 1e-8 else 1.0
    factors = tuple(weight * scale for weight in weights)
    if whole:
        return Merge("task_arithmetic", factors)
    parameters = []
    if sparse == "random":
        parameters += _per_member("drop", [1 - density for density in densities], members)
    else:
        parameters += _per_member("density", densities, members)
    if sparse == "outliers":  # mergekit keeps the density where both shares exceed 1
        gammas = [min(one["gamma"], 1 - density) for one, density in zip(own, densities, strict=True)]
        parameters += _per_member("gamma", gammas, members)
    if sparse == "ranks":
        epsilons = [one["epsilon"] if density < 1 else 0.0 for one, density in zip(own, densities, strict=True)]
        parameters += _per_member("epsilon", epsilons, members)
    parameters.append(("entries", "elected_mean" if mean else "elected" if elects else "all"))
    if sparse != "outliers":
        parameters.append(("rescale", "l1" if shared["rescale"] else "none"))
        diagnostics.note(
            f"{method} drops entries at random: mergekit's random numbers, which follow its seed, are others"
        )
    if mean and shared["lambda"] != 1:
        parameters.append(("lambda", shared["lambda"]))
    ours = {"random": "dare", "outliers": "breadcrumbs"}.get(str(sparse), "della")
    return Merge(ours, factors, tuple(parameters))


def _per_member(name: str, values: Sequence[float], members: Sequence[str]) -> list[tuple[str, Value]]:
    """A parameter, and its value for those members that have another than the first."""
    others = [(f"{name}{GROUP}{member}", value) for member, value in zip(members, values, strict=True)]
    return [(name, values[0]), *((key, value) for key, value in others if value != values[0])]
