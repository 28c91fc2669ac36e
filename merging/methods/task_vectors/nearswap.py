"""NearSwap: task vectors whose entries are cut off at a magnitude."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import Block, Deltas, combined
from merging.recipe import Value


@register
class NearSwap(Method):
    """θ_0 + Σ α_t clamp(τ_t, −t, t): what lies within t of the base is the member's, the rest moves by t (alchemonaut 2024).

    Of one member with factor 1 that is mergekit's `nearswap`, w θ_1 + (1 − w) θ_0 with w = min(t / |τ|, 1).
    """

    name = "nearswap"
    summary = "task vectors with a largest magnitude"
    elementwise = True
    scaling = Parameter(1.0, "scale of the member's clamped task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "t": Parameter(1e-4, "largest magnitude of an entry", low=1e-5, high=1e-2, log=True, minimum=0.0),
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members."""
        return PreparedNearSwap(weights)


class PreparedNearSwap(Deltas):
    """Base and members as they are stored."""

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Clamps in place, then adds up."""
        most = float(parameters["t"])
        return lambda weight, start, deltas: combined(deltas.clamp_(-most, most), factors, "all", self.scratch)
