"""What a candidate must not break, whatever its objective: how far below its own member a task may fall, or below a number."""

from collections.abc import Callable, Collection, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from merging.errors import SettingsError
from merging.registry import did_you_mean


class Constraint(BaseModel):
    """A bound on the score of a task, or of every task: `{task: amazon, drop: 0.05}`, `{floor: 0.6}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str | None = Field(None, description="The task; by default every task has this bound.")
    drop: float | None = Field(
        None,
        ge=0,
        description="The score may be this much lower than that of the task's own member (0.05 of accuracy: five points).",
    )
    floor: float | None = Field(None, description="The score must not be lower than this.")

    @model_validator(mode="after")
    def _one_bound(self) -> "Constraint":
        if (self.drop is None) == (self.floor is None):
            raise ValueError("give `drop` or `floor`, one of them")
        return self

    def over(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """The tasks that it bounds."""
        return (self.task,) if self.task is not None else tuple(tasks)


def check(constraints: Sequence[Constraint], tasks: Sequence[str], own: Collection[str]) -> None:
    """Whether the constraints can be told apart and speak of tasks that there are.

    Args:
        constraints: The bounds.
        tasks: All tasks.
        own: Tasks that have a member of their own.

    Raises:
        SettingsError: A task is unknown, has two bounds of one kind, or lacks the member that its `drop` is measured from.
    """
    names: set[str] = set()
    for constraint in constraints:
        for task in constraint.over(tasks):
            if task not in tasks:
                raise SettingsError(f"constraints: unknown task '{task}'. {did_you_mean(task, list(tasks))}")
            if constraint.drop is not None and task not in own:
                raise SettingsError(
                    f"constraints: `drop` compares task '{task}' with its own member, and there is none: give a `floor`, or "
                    f"give a member `task: {task}`"
                )
            if (name := _name(constraint, task)) in names:
                raise SettingsError(
                    f"constraints: task '{task}' has two bounds of the kind '{name.rpartition('.')[2]}'"
                )
            names.add(name)


def violations(
    scores: Mapping[str, float], references: Mapping[str, float], constraints: Sequence[Constraint]
) -> dict[str, float]:
    """By how much each constraint is broken; 0 or less where it holds.

    Args:
        scores: Score of every task, larger is better.
        references: Score of each task's own member; only `drop` asks for it.
        constraints: The bounds.

    Returns:
        `<task>.drop` and `<task>.floor` → bound − score, in the unit of the task's metric.

    Raises:
        KeyError: A task that is bounded has no score, or no reference.
    """
    by_name = {}
    for constraint in constraints:
        for task in constraint.over(sorted(scores)):
            bound = constraint.floor if constraint.drop is None else references[task] - constraint.drop
            by_name[_name(constraint, task)] = (0.0 if bound is None else bound) - scores[task]
    return by_name


def make_constraints(
    constraints: Sequence[Constraint], tasks: Sequence[str], references: Mapping[str, float]
) -> Callable[[Mapping[str, float]], dict[str, float]] | None:
    """`violations` of scores alone; None where nothing is bounded.

    Raises:
        SettingsError: As `check` says.
    """
    check(constraints, tasks, references)
    return (lambda scores: violations(scores, references, constraints)) if constraints else None


def _name(constraint: Constraint, task: str) -> str:
    return f"{task}.{'floor' if constraint.drop is None else 'drop'}"
