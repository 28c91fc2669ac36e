"""From a campaign file to an opened pool and tasks: everything that can be wrong is found here, before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.config import Campaign
from flows.progress import Display
from merging.methods import METHODS
from merging.pool import Pool
from merging.tasks import make_task
from merging.tasks.base import Task
from ray_tasks.evaluation import Setup


@dataclass(frozen=True)
class Opened:
    """A campaign's pool and tasks, checked.

    Args:
        campaign: The campaign.
        pool: Base and members.
        tasks: Task → task, bound to the head of its owner.
        distances: Member → ‖θ_t − θ_0‖ / ‖θ_0‖.
    """

    campaign: Campaign
    pool: Pool
    tasks: Mapping[str, Task]
    distances: Mapping[str, float]

    @property
    def kinds(self) -> list[str]:
        """Kinds of statistic that the campaign's methods need."""
        found: set[str] = set()
        for name, space in self.campaign.search.methods.items():
            method = METHODS[name]
            usual = {key: spec.default for key, spec in method.parameters.items()}
            found.update(method.needs(usual) if not space.parameters else ())
            for key, domain in space.parameters.items():
                for value in domain.values:
                    found.update(method.needs({**usual, key: value}))
        return sorted(found)

    def examples(self) -> dict[str, int]:
        """Member → number of training examples behind it, where that is known."""
        found = {}
        for member, settings in self.campaign.members.items():
            task = self.campaign.task_of(member)
            size = settings.examples or (self.tasks[task].size("train") if task else 0)
            if size:
                found[member] = size
        return found

    def task_of(self, member: str) -> Task | None:
        """A member's own task, bound to its own checkpoint; None where it has none here."""
        name = self.campaign.task_of(member)
        if name is None:
            return None
        return make_task(name, self.campaign.tasks[name], self.campaign.members[member].checkpoint)

    def setup(self, statistics: Mapping[str, tuple[str, ...]]) -> Setup:
        """What an evaluator builds itself from."""
        campaign = self.campaign
        return Setup(
            base=campaign.base,
            members={name: member.checkpoint for name, member in campaign.members.items()},
            heads=campaign.heads,
            statistics=statistics,
            examples=self.examples(),
            tasks=dict(campaign.tasks),
            owners=campaign.owners(),
            precision=campaign.resources.precision,
        )

    def fingerprints(self) -> dict[str, Any]:
        """Content hashes of base, members and evaluation data: `pool.json`."""
        data = {
            name: {split: task.data_fingerprint(split) for split in ("validation", "test") if task.size(split)}
            for name, task in self.tasks.items()
        }
        return {
            "checkpoints": self.pool.fingerprints(),
            "data": data,
            "relative_distance": {name: round(value, 6) for name, value in self.distances.items()},
            "merged": len(self.pool.weights),
            "heads": {name: list(member.head) for name, member in self.pool.members.items()},
        }

    def evaluator_bytes(self) -> int:
        """Estimated memory of an evaluator: models, and for every method one float32 copy of each member's weights."""
        weights = sum(info.nbytes for info in self.pool.weights.values())
        return (1 << 30) + weights * (2 + len(self.pool.members) * len(self.campaign.search.methods))


def open_campaign(campaign: Campaign, display: Display) -> Opened:
    """Opens and checks pool and tasks.

    Raises:
        MergequestError: Something is unusable; the message names it.
    """
    pool = Pool.open(
        campaign.base, {name: member.checkpoint for name, member in campaign.members.items()}, campaign.heads
    )
    for note in pool.notes:
        display.note(note)
    owners = campaign.owners()
    tasks = {
        name: make_task(name, settings, campaign.members[owners[name]].checkpoint)
        for name, settings in campaign.tasks.items()
    }
    for task in tasks.values():
        for note in task.check():
            display.note(note)
    distances = pool.check_weights()
    size = sum(info.nbytes for info in pool.weights.values())
    heads = {key for member in pool.members.values() for key in member.head}
    display.say(
        f"  {pool.base.architecture}: {len(pool.members)} members, {len(pool.weights)} merged weights "
        f"({size / 1e6:.0f} MB), {len(heads)} tensors kept per task, {len(tasks)} tasks"
    )
    return Opened(campaign, pool, tasks, distances)
