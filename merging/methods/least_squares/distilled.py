"""A merge into which its members' outputs were distilled."""

from collections.abc import Mapping
from typing import ClassVar

from merging.methods.least_squares.precomputed import FACTOR, Solved
from merging.methods.method import Parameter, register


@register
class DistilledMethod(Solved):
    """What `merging.optimization.distillation` made of another merge of these very members, scaled as a whole; see `Solved`.

    A campaign's last step (`distil`) computes it from the winner of the search.
    """

    name = "distilled"
    summary = "another merge, into which the members' outputs were distilled"
    solution = "distilled"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "factor": FACTOR,
        "start": Parameter("", "identity of the merge that it started from", search=False),
    }
