"""Tasks: data in splits, a head, and a score."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from merging.tasks.custom import Custom, CustomSettings
from merging.tasks.harness.harness_task import HarnessSettings, HarnessTask
from merging.tasks.language.causal_lm import CausalLM, CausalLMSettings
from merging.tasks.language.seq2seq import Seq2Seq, Seq2SeqSettings
from merging.tasks.predictions import Predictions
from merging.tasks.tagging.token_classification import TokenClassification, TokenClassificationSettings
from merging.tasks.task import SPLITS, TASKS, Batch, Score, Split, Task, TaskSettings
from merging.tasks.text_classification import TextClassification, TextClassificationSettings
from merging.tasks.vision.image_classification import ImageClassification, ImageClassificationSettings
from merging.tasks.vision.zero_shot import ZeroShotImageClassification, ZeroShotSettings

__all__ = [
    "SPLITS",
    "TASKS",
    "AnyTaskSettings",
    "Batch",
    "CausalLM",
    "CausalLMSettings",
    "Custom",
    "CustomSettings",
    "HarnessSettings",
    "HarnessTask",
    "ImageClassification",
    "ImageClassificationSettings",
    "Predictions",
    "Score",
    "Seq2Seq",
    "Seq2SeqSettings",
    "Split",
    "Task",
    "TaskSettings",
    "TextClassification",
    "TextClassificationSettings",
    "TokenClassification",
    "TokenClassificationSettings",
    "ZeroShotImageClassification",
    "ZeroShotSettings",
    "make_task",
]


def _of_a_kind(value: Any) -> Any:
    """Settings that name no kind, with the usual one; pydantic would need it to tell them apart."""
    return {"kind": TextClassification.kind} | value if isinstance(value, dict) else value


AnyTaskSettings = Annotated[
    TextClassificationSettings
    | CausalLMSettings
    | Seq2SeqSettings
    | ImageClassificationSettings
    | ZeroShotSettings
    | TokenClassificationSettings
    | HarnessSettings
    | CustomSettings,
    Field(discriminator="kind"),
    BeforeValidator(_of_a_kind),
]
"""What a campaign file may say of a task; its `kind` decides which fields it has."""


def make_task(name: str, settings: AnyTaskSettings, head: str, base: str = "") -> Task:
    """A task of the kind that its settings are of.

    Args:
        name: Its name in the campaign.
        settings: What the campaign file says of it.
        head: Path of the checkpoint that brings the task's head, configuration and preprocessor.
        base: The base that the head's checkpoint belongs to, if that is an adapter; by default what the adapter names.
    """
    kind, _ = TASKS[settings.kind]
    task = kind(name, settings, head)
    task.base = base
    return task
