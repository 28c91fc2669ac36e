"""How scores are shown: shares as per cent, everything else as it is. Each metric says which it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from merging.tasks.task import TaskSettings
from search.objective import EXPECTED

PERCENT = 100
"""What shares are multiplied by."""


@dataclass(frozen=True)
class Scales:
    """What scores are multiplied by to be read.

    Args:
        tasks: Task → 100 or 1; a task that is not there has shares.
        unseen: Tasks that belong to no member: their mean is shown apart.
    """

    tasks: Mapping[str, int] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()

    def of_task(self, task: str) -> int:
        """Of a task's scores."""
        return self.tasks.get(task, PERCENT)

    def of_tasks(self, tasks: Iterable[str]) -> int:
        """Of what several tasks' scores are summed up to: that of all, or 1 where they differ."""
        scales = {self.of_task(task) for task in tasks}
        return scales.pop() if len(scales) == 1 else 1

    def of_objective(self, name: str, tasks: Iterable[str]) -> int:
        """Of an objective: what is expected, and what is divided by the own members' scores, are shares in any case."""
        if name.startswith(EXPECTED) or name == "normalized":
            return PERCENT
        return self.of_task(name) if name in tasks else self.of_tasks(tasks)


def scales_of(tasks: Mapping[str, TaskSettings]) -> Scales:
    """The scales of a campaign's tasks."""
    return Scales(
        {name: PERCENT if settings.is_percent else 1 for name, settings in tasks.items()},
        frozenset(name for name, settings in tasks.items() if settings.role == "unseen"),
    )


def percent(times: int) -> str:
    """What a caption says of a scale."""
    return f" × {times}" if times != 1 else ""


def digits(times: int) -> int:
    """How many decimals are shown at a scale."""
    return 1 if times != 1 else 3
