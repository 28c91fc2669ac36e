"""mergekit's methods as it declares them: their parameters with its defaults, and how each uses the base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""In place of a default: the file must give the parameter."""
PASSTHROUGH = "passthrough"
"""mergekit's method that copies layers, which becomes a slices file."""


@dataclass(frozen=True)
class MergekitMethod:
    """What is known of a method of mergekit's.

    Args:
        shared: Parameters of the whole merge, with their defaults.
        own: Parameters of each model, with their defaults.
        base: `apart` (required, and no member), `any` (apart if there is one), `member` (one of the models), `none`.
        sparse: How task vectors are thinned, if they are.
        elects: Whether signs are elected.
    """

    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    base: Literal["apart", "any", "member", "none"] = "apart"
    sparse: Literal["magnitude", "random", "outliers", "ranks"] | None = None
    elects: bool = False


def _of_task_vectors(
    sparse: Literal["magnitude", "random", "outliers", "ranks"] | None,
    elects: bool,
    normalize: bool,
    rescale: bool,
    **own: float,
) -> MergekitMethod:
    shared = {"lambda": 1.0, "int8_mask": False, "normalize": normalize, "rescale": rescale}
    return MergekitMethod(shared, {"weight": REQUIRED, "density": 1.0, **own}, "apart", sparse, elects)


METHODS: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod({"normalize": True}, {"weight": REQUIRED}, "none"),
    "slerp": MergekitMethod({"t": REQUIRED}, base="member"),
    "nuslerp": MergekitMethod({"nuslerp_row_wise": False, "nuslerp_flatten": True}, {"weight": REQUIRED}, "any"),
    "multislerp": MergekitMethod({"normalize_weights": True, "eps": 1e-8}, {"weight": REQUIRED}, "any"),
    "karcher": MergekitMethod({"max_iter": 10, "tol": 1e-5}, base="none"),
    "model_stock": MergekitMethod({"filter_wise": False}),
    "sce": MergekitMethod({"select_topk": 1.0, "int8_mask": False}),
    "nearswap": MergekitMethod({"t": REQUIRED}),
    "arcee_fusion": MergekitMethod(),
    "ram": MergekitMethod({"epsilon": 1e-5}),
    "ramplus_tl": MergekitMethod({"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "task_arithmetic": _of_task_vectors(None, False, normalize=False, rescale=False),
    "ties": _of_task_vectors("magnitude", True, normalize=True, rescale=False),
    "dare_ties": _of_task_vectors("random", True, normalize=False, rescale=True),
    "dare_linear": _of_task_vectors("random", False, normalize=False, rescale=True),
    "breadcrumbs": _of_task_vectors("outliers", False, normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _of_task_vectors("outliers", True, normalize=False, rescale=False, gamma=0.01),
    "della": _of_task_vectors("ranks", True, normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _of_task_vectors("ranks", False, normalize=False, rescale=True, epsilon=0.15),
    PASSTHROUGH: MergekitMethod(own={"scale": 1.0}, base="none"),
}
"""mergekit's methods that can be expressed."""
PARAMETERS = {name for method in METHODS.values() for name in (*method.shared, *method.own)}
"""Names of all methods' parameters: one that a method does not have is left out, as mergekit does."""
