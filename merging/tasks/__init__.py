"""Tasks: data in splits, a head, and a score."""

from typing import Annotated

from pydantic import Field

from merging.tasks.base import SPLITS, TASKS, Batch, Score, Split, Task, TaskSettings
from merging.tasks.custom import Custom, CustomSettings
from merging.tasks.text_classification import TextClassification, TextClassificationSettings

__all__ = [
    "SPLITS",
    "TASKS",
    "AnyTaskSettings",
    "Batch",
    "Custom",
    "CustomSettings",
    "Score",
    "Split",
    "Task",
    "TaskSettings",
    "TextClassification",
    "TextClassificationSettings",
    "make_task",
]

AnyTaskSettings = Annotated[TextClassificationSettings | CustomSettings, Field(discriminator="kind")]
"""What a campaign file may say of a task; its `kind` decides which fields it has."""


def make_task(name: str, settings: AnyTaskSettings, head: str) -> Task:
    """A task of the kind that its settings are of.

    Args:
        name: Its name in the campaign.
        settings: What the campaign file says of it.
        head: Path of the checkpoint that brings the task's head, configuration and preprocessor.
    """
    task, _ = TASKS[settings.kind]
    return task(name, settings, head)
