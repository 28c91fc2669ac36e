"""Some of the members beside one copy of the merged model: what one process does of a propagation."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from merging.checkpoints.pool import Pool
from merging.propagation.equations import Equations, LeastSquaresUpdate
from merging.propagation.member import MemberPasses, PassPlan
from merging.propagation.settings import PropagationSettings
from merging.tasks.task import Task


class MemberGroup:
    """Members that are led from layer to layer together.

    Args:
        pool: Base and members.
        tasks: Member → its task.
        members: Who belongs to it.
        out: The merged weights by the base's name, float32, on the device; `apply` overwrites them.
        settings: Examples, ridge, kind of update, factors.

    Raises:
        MethodError: A task has no logits or no training examples.
    """

    def __init__(
        self,
        pool: Pool,
        tasks: Mapping[str, Task],
        members: Sequence[str],
        out: dict[str, Tensor],
        settings: PropagationSettings,
    ) -> None:
        self.out = out
        self._settings = settings
        self._passes = [MemberPasses(pool, member, tasks[member], out, settings) for member in members]
        self.plans: list[PassPlan] = [passes.plan for passes in self._passes]

    def begin(self, groups: Sequence[Sequence[str]]) -> None:
        """Starts all passes; `groups` are the weights of layers that share an input, in the order of running."""
        for passes in self._passes:
            passes.begin(groups)

    def equations(self, group: Sequence[str]) -> Equations:
        """Leads all passes to a group, and sums Σ_t α_t × the means over member t's rows.

        Means, so that members count equally, however long their examples are.

        Raises:
            MethodError: An activation is not finite.
        """
        total = Equations(next(iter(self.out.values())).device)
        for passes in self._passes:
            total.add_mean(passes.equations(group), self._settings.factors.get(passes.member, 1.0))
        return total

    def apply(self, group: Sequence[str], solution: LeastSquaresUpdate) -> None:
        """Adds a group's solution to the merged weights."""
        start = 0
        for name in group:
            layer = self.plans[0].layers[name]
            stop = start + layer.outputs(self.out)
            layer.add(solution.delta[:, start:stop].to(self.out[name]), self.out)
            start = stop

    def end(self) -> None:
        """Gives the rest of all passes up."""
        for passes in self._passes:
            passes.end()
