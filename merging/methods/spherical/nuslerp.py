"""NuSLERP: two members, joined by arcs of tensors, rows or columns, with weights that are normalised."""

from collections.abc import Mapping
from typing import ClassVar

from merging.methods.method import Parameter, register
from merging.methods.spherical.interpolation import OVER
from merging.methods.spherical.slerp import Slerp


@register
class NuSlerp(Slerp):
    """Spherical interpolation of two task vectors or weights, of whole tensors or row by row (as mergekit's `nuslerp`).

    t is the second's factor over the sum of both. Unlike `slerp`, short arcs are arcs: a line takes their place only where
    the two agree to rounding, and between opposite vectors, which no arc joins. mergekit's `nuslerp_flatten` is `over` =
    `tensor`; without it, mergekit goes by rows, and by columns if `nuslerp_row_wise` is set.
    """

    name = "nuslerp"
    summary = "spherical interpolation of two members, also row by row"
    extras = ("layout",)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "space": Parameter("task_vectors", "what is interpolated", choices=("task_vectors", "weights"), search=False),
        "over": OVER,
    }
    line: ClassVar[float] = 1 - 1e-12
