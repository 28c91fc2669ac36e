"""Model breadcrumbs: task vectors without their largest entries, which are outliers, and their smallest, which are noise."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from merging.kernels import cpu
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, of_member, register
from merging.methods.task_vectors import top_k
from merging.methods.task_vectors.elementwise import AGREE, LAMBDA, OF_AGREE, Block, Deltas, combined
from merging.recipe import GROUP, Value


@register
class Breadcrumbs(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t, m_t without the largest γ and the smallest of each tensor (Davari and Belilovsky 2024).

    Equal magnitudes at either threshold are settled by a random number of weight and index, as in TIES.
    """

    name = "breadcrumbs"
    summary = "task vectors without their largest and smallest entries"
    elementwise = True
    per_member = ("density", "gamma")
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "density": Parameter(
            0.85, "share of entries that stay in every tensor", low=0.05, high=0.95, minimum=0.0, maximum=1.0
        ),
        "gamma": Parameter(
            0.01, "share of entries, the largest, that are dropped", low=0.0, high=0.05, minimum=0.0, maximum=0.99
        ),
        "entries": AGREE,
        "lambda": LAMBDA,
    }

    def global_pass(self, weights: Iterable[Weight]) -> top_k.MagnitudeStatistics:
        """Histograms of the task vectors' magnitudes."""
        return top_k.global_pass(weights)

    def combine(
        self, first: top_k.MagnitudeStatistics | None, second: top_k.MagnitudeStatistics | None
    ) -> top_k.MagnitudeStatistics:
        """Both weights' histograms."""
        return top_k.combine(first, second)

    def second_pass(
        self, weights: Iterable[Weight], global_stats: top_k.MagnitudeStatistics, parameters: Mapping[str, Value]
    ) -> top_k.MagnitudeStatistics | None:
        """Exact counts around the thresholds."""
        shares = [_shares(parameters, member) for member in ["", *_named(parameters)]]
        return top_k.second_pass(
            weights, global_stats, sorted({share for two in shares for share in two if share}), whole=False
        )

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, and the histograms; thresholds come with densities."""
        global_stats = self.global_pass(weights) if context.global_stats is None else context.global_stats
        return PreparedBreadcrumbs(weights, top_k.Trimmer(weights, global_stats))


def _shares(parameters: Mapping[str, Value], member: str) -> tuple[float, float]:
    """Of a tensor's entries, a member's outliers, and those that stay or are outliers."""
    gamma = of_member(parameters, "gamma", member)
    return gamma, min(of_member(parameters, "density", member) + gamma, 1.0)


def _named(parameters: Mapping[str, Value]) -> list[str]:
    """The members with parameters of their own."""
    return sorted({key.partition(GROUP)[2] for key in parameters if GROUP in key})


class PreparedBreadcrumbs(Deltas):
    """Base, members and histograms.

    Args:
        weights: The weights to merge.
        trimmer: Knows the weights' histograms.
    """

    def __init__(self, weights: Sequence[Weight], trimmer: top_k.Trimmer) -> None:
        super().__init__(weights)
        self._trimmer = trimmer

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Trims in place to the largest density + γ, less the largest γ."""
        scale = float(parameters["lambda"])

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            outliers = self.scratch.take("outliers", deltas.shape[1], device=deltas.device)
            cuts = [self._cuts(weight, member, *_shares(parameters, member)) for member in members]
            numbers = self._trimmer.numbers(weight, start, deltas.shape[1], (cut for two in cuts for cut in two if cut))
            for row, (cut, largest) in zip(deltas, cuts, strict=True):
                if largest is not None:
                    largest.apply(outliers.copy_(row), numbers)
                    row.sub_(outliers)
                cut.apply(row, numbers)
            return combined(deltas, factors, str(parameters["entries"]), self.scratch).mul_(scale)

        return block

    def _cuts(self, weight: Weight, member: str, gamma: float, share: float) -> tuple[top_k.Cut, top_k.Cut | None]:
        """What keeps the largest density + γ of a member's entries, and the outliers among them, if there are any."""
        some = self._trimmer.share(weight.name, member, gamma)
        outliers = self._trimmer.cut(member, gamma, weight.name) if some else None
        return self._trimmer.cut(member, share, weight.name), outliers

    def rule(
        self, weight: Weight, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]
    ) -> cpu.Rule:
        """Trims on both sides, and adds up."""
        cuts = [self._cuts(weight, member, *_shares(parameters, member)) for member in members]
        return cpu.Rule(
            factors,
            OF_AGREE[str(parameters["entries"])],
            float(parameters["lambda"]),
            bounds=[cut.bounds(outliers) for cut, outliers in cuts],
            keys=[self._trimmer.keys(weight)],
            offset=weight.start,
        )
