"""Merges that are found by running models: a solution of all members together, scaled as a whole."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch, weighted_sum
from merging.methods.checks import check_weights, target
from merging.methods.method import Context, Method, Parameter, Prepared, Weight
from merging.recipe import Value

FACTOR = Parameter(1.0, "scale of the whole merge's distance from the base", low=0.7, high=1.3)


class Solved(Method):
    """θ_0 + f (θ* − θ_0), θ* a solution for these very members that is kept as a statistics file of the kind `solution`.

    The solution is dear and computed once; a candidate costs one weighted sum. Scaling factors of members have no part in it
    and stay at 1.
    """

    scaling = Parameter(1.0, "no part in the solution", minimum=1.0, maximum=1.0, search=False)
    scale_free = True
    parameters: ClassVar[Mapping[str, Parameter]] = {"factor": FACTOR}

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and solutions."""
        check_weights(weights)
        assert self.solution is not None
        return PreparedSolution(weights, self.solution)


class PreparedSolution(Prepared):
    """Base and solutions, as they are stored.

    Args:
        weights: The weights to merge.
        kind: The solution's kind among the statistics.
    """

    def __init__(self, weights: Sequence[Weight], kind: str) -> None:
        self._weights = tuple(weights)
        self._kind = kind
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and solution.

        Raises:
            MethodError: There is no solution for these members.
        """
        subset = "+".join(sorted(scaling))
        factor = float(parameters["factor"])
        for weight in self._weights:
            solution = weight.statistics.get(self._kind, {}).get(subset)
            if solution is None:
                raise MethodError(
                    f"'{weight.name}' has no {self._kind} solution for {subset}: compute it for these members"
                )
            terms = [(solution, factor)] if factor == 1.0 else [(weight.base, 1.0 - factor), (solution, factor)]
            weighted_sum(terms, target(out, weight), self._scratch)
