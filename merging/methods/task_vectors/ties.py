"""TIES: trim task vectors to their largest entries, elect a sign for every entry, merge those that agree."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from merging.kernels import cpu
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, of_member, register
from merging.methods.task_vectors import top_k
from merging.methods.task_vectors.elementwise import Block, Deltas, elected
from merging.recipe import GROUP, Value


@register
class Ties(Method):
    """θ_0 + λ · merge of the trimmed task vectors that agree in sign (Yadav et al. 2023, algorithm 1).

    Equal magnitudes at the threshold, which are many in 16-bit models, are kept by a random number of weight and index, so that
    the share that stays is `density` in expectation everywhere.
    """

    name = "ties"
    summary = "trim, elect sign, merge what agrees"
    scale_free = True
    elementwise = True
    per_member = ("density",)
    scaling = Parameter(1.0, "the member's weight in the election and in the mean", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "density": Parameter(
            0.2, "share of entries that stay, the largest", low=0.05, high=1.0, minimum=0.0, maximum=1.0
        ),
        "lambda": Parameter(1.0, "scale of the merged task vector", low=0.1, high=1.5),
        "trim": Parameter(
            "global",
            "share over the whole model, or in every tensor",
            choices=("global", "tensor"),
            search=False,
        ),
        "disjoint": Parameter("mean", "mean or sum of what agrees", choices=("mean", "sum"), search=False),
    }

    def global_pass(self, weights: Iterable[Weight]) -> top_k.MagnitudeStatistics:
        """Histograms of the task vectors' magnitudes."""
        return top_k.global_pass(weights)

    def sample(self, weights: Iterable[Weight], parameters: Mapping[str, Value]) -> top_k.MagnitudeStatistics:
        """For a trim over the whole model, histograms of a sample."""
        return top_k.sample(weights) if parameters["trim"] == "global" else self.global_pass(weights)

    def combine(
        self, first: top_k.MagnitudeStatistics | None, second: top_k.MagnitudeStatistics | None
    ) -> top_k.MagnitudeStatistics:
        """Both weights' histograms."""
        return top_k.combine(first, second)

    def second_pass(
        self, weights: Iterable[Weight], global_stats: top_k.MagnitudeStatistics, parameters: Mapping[str, Value]
    ) -> top_k.MagnitudeStatistics | None:
        """Exact counts around the thresholds."""
        return top_k.second_pass(weights, global_stats, _densities(parameters), whole=parameters["trim"] == "global")

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, and the histograms; thresholds come with densities."""
        global_stats = self.global_pass(weights) if context.global_stats is None else context.global_stats
        return PreparedTies(weights, top_k.Trimmer(weights, global_stats))


def _densities(parameters: Mapping[str, Value]) -> list[float]:
    """Of all members and of single ones."""
    return sorted({float(value) for key, value in parameters.items() if key.partition(GROUP)[0] == "density"})


class PreparedTies(Deltas):
    """Base, members and histograms.

    Args:
        weights: The weights to merge.
        trimmer: Knows the histograms of the whole model.
    """

    def __init__(self, weights: Sequence[Weight], trimmer: top_k.Trimmer) -> None:
        super().__init__(weights)
        self._trimmer = trimmer

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Trims in place, then elects and merges."""
        scale = float(parameters["lambda"])
        disjoint, whole = str(parameters["disjoint"]), parameters["trim"] == "global"

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            cuts = self._cuts(members, parameters, "" if whole else weight.name)
            numbers = self._trimmer.numbers(weight, start, deltas.shape[1], cuts)
            for row, cut in zip(deltas, cuts, strict=True):
                cut.apply(row, numbers)
            return elected(deltas, factors, disjoint, self.scratch).mul_(scale)

        return block

    def _cuts(self, members: Sequence[str], parameters: Mapping[str, Value], group: str) -> list[top_k.Cut]:
        return [self._trimmer.cut(member, of_member(parameters, "density", member), group) for member in members]

    def rule(
        self, weight: Weight, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]
    ) -> cpu.Rule:
        """Trims, elects and merges."""
        name = "" if parameters["trim"] == "global" else weight.name
        cuts = self._cuts(members, parameters, name)
        return cpu.Rule(
            factors,
            str(parameters["disjoint"]),
            float(parameters["lambda"]),
            bounds=[cut.bounds() for cut in cuts],
            keys=[self._trimmer.keys(weight)],
            offset=weight.start,
        )
