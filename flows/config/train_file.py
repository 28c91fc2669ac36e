"""The file of `mergequest train`: a base, tasks, and how members are fine-tuned on them."""

from typing import Any

from pydantic import Field, model_validator

from flows.config.campaign_file import resolve_data
from flows.config.pool_settings import BaseCheckpoint
from flows.config.yaml_file import Name, Settings, parent, require_known, resolve, said_in, validate
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks import TASKS, AnyTaskSettings


class Partition(Settings):
    """Several members from one data set: its train split in parts that differ in how often each class occurs.

    Of every class, shares of the parts are drawn from a Dirichlet distribution (Hsu et al. 2019; RegMean, appendix B). An
    example of several labels counts as the rarest of them.
    """

    task: str = Field(
        description="The task whose train split is cut; its members are called `<task>-1`, `<task>-2`, …."
    )
    parts: int = Field(ge=2, le=1000, description="How many.")
    concentration: float = Field(
        0.5,
        gt=0,
        description="Of the distribution: small for parts of few classes each, large for parts that are alike.",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of the shares and of which example goes where.")


class TrainFile(Settings):
    """What `mergequest train` makes members from."""

    base: BaseCheckpoint
    out: str = Field("members", description="Directory to fill: one Hugging Face directory for each member.")
    tasks: dict[Name, AnyTaskSettings] = Field(
        min_length=1, description="A member each, as in a campaign file; trained on the `train` split."
    )
    labels: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Task → classes of its new head, in order; by default those of the task's own `labels`, else of its data.",
    )
    shared_head: bool = Field(
        False,
        description="One head for all: the base gets it first, as `base` in `out`, so that merges of the members merge it. For "
        "tasks of one kind with the same classes.",
    )
    own_head: tuple[str, ...] = Field((), description="Tasks for which the base's own head is trained on.")
    together: Name | None = Field(
        None, description="Also train one model on all tasks together, under this name: the multi-task baseline."
    )
    partition: Partition | None = Field(None, description=Partition.__doc__)
    training: TrainingSettings = Field(default_factory=TrainingSettings, description=TrainingSettings.__doc__)
    threads: int = Field(1, ge=1, description="Torch threads of each training; more than one seldom pays on few cores.")

    @model_validator(mode="after")
    def _names_agree(self) -> "TrainFile":
        named = {"labels": self.labels, "own_head": self.own_head}
        for place, names in named.items():
            for name in names:
                require_known(place, "task", name, self.tasks)
        if both := set(self.labels) & set(self.own_head):
            raise ValueError(f"own_head: '{min(both)}' has new `labels`; leave one of the two out")
        for name, task in self.tasks.items():
            kind = TASKS[task.kind][0]
            if not kind.has_logits or "train" not in getattr(task, "data", {}):
                raise ValueError(f"tasks.{name}: training needs a kind of task that gives logits, with `data.train`")
        if self.shared_head and (self.own_head or len({task.kind for task in self.tasks.values()}) > 1):
            raise ValueError("shared_head: for tasks of one kind, none of which has `own_head`")
        if self.partition is not None:
            require_known("partition.task", "task", self.partition.task, self.tasks)
            own = self.tasks[self.partition.task]
            if getattr(own, "label", None) is None or getattr(own, "problem_type", None) == "regression":
                raise ValueError("partition.task: parts differ in classes, and it has no `label` that is of classes")
        taken = {*self.tasks, *(["base"] if self.shared_head else [])}
        if self.together in taken:
            raise ValueError(f"together: '{self.together}' is taken")
        return self


def load_train_file(given: dict[str, Any], path: str) -> TrainFile:
    """A train file's content with its paths made absolute, relative to the file.

    Args:
        given: The file's content.
        path: The file.

    Raises:
        SettingsError: Something in it is wrong: every mistake is in the message.
    """
    root = parent(path)
    settings = validate(TrainFile, given, path).model_dump(mode="json")
    with said_in(path):
        settings["base"], settings["out"] = resolve(settings["base"], root), resolve(settings["out"], root)
        resolve_data(settings["tasks"].values(), root)
    return validate(TrainFile, settings, path)
