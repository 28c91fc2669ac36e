"""Settings of tasks on prompts and completions, whatever kind of language model gives them."""

import os
import re
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from merging.checkpoints.adapters.patterns import compiled
from merging.errors import CheckpointError
from merging.registry import did_you_mean
from merging.tasks.task import Split, TaskSettings
from merging.tasks.user_functions import FUNCTION

Likelihood: TypeAlias = Literal["log_likelihood", "neg_perplexity"]
Choice: TypeAlias = Literal["accuracy", "accuracy_norm", "accuracy_unconditional"]
Generated: TypeAlias = Literal["exact_match", "contains", "number", "chrf", "bleu", "rouge_l"]
LIKELIHOODS: tuple[str, ...] = ("log_likelihood", "neg_perplexity")
CHOICES: tuple[str, ...] = ("accuracy", "accuracy_norm", "accuracy_unconditional")


def _known(name: Any) -> Any:
    known = [*LIKELIHOODS, *CHOICES, *get_args(Generated)]
    if isinstance(name, str) and name not in known and not re.match(FUNCTION, name):
        raise ValueError(f"unknown metric '{name}'. {did_you_mean(name, known)}")
    return name


Metric: TypeAlias = Annotated[
    Likelihood | Choice | Generated | Annotated[str, Field(pattern=FUNCTION)], BeforeValidator(_known)
]
"""A metric's name, or a function of the user's own."""


class LanguageSettings(TaskSettings):
    """What tasks on prompts and completions have in common."""

    data: dict[Split, str | Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1, description="Split (train, validation, test) → file or list of files: Parquet, CSV or JSON lines."
    )
    prompt: str | None = Field("prompt", description="Column of the prompt; not used where `template` is given.")
    completion: str | None = Field(
        "completion",
        description="Column of the completion, the only part that is scored; null: members complete prompts.",
    )
    template: str | None = Field(None, description="Jinja template of the prompt over an example's columns.")
    choices: str | None = Field(None, description="Column of a list of completions to choose from.")
    label: str = Field("label", description="Column of the right choice: its position, or its text.")
    metric: Metric | None = Field(
        None,
        description="log_likelihood (mean over examples, nats per token), neg_perplexity; with `choices`: accuracy, "
        "accuracy_norm (by length in bytes), accuracy_unconditional (less the likelihood without prompt); of greedy "
        "generation: exact_match, contains, number, rouge_l, and of all examples together chrf, bleu, or a function of your "
        "own, `module:function`, of what is generated and the completion, that returns a number. Default: accuracy with "
        "`choices`, else log_likelihood.",
    )
    extract: str | None = Field(
        None, description="Regular expression; its last match (first group) in what is generated is what counts."
    )
    max_new_tokens: int = Field(64, ge=1, le=32768, description="Tokens that are generated at most.")
    max_length: int = Field(
        1024, ge=2, description="Tokens of an example; what is longer loses the prompt's beginning."
    )
    batch_size: int = Field(16, ge=1, description="Sequences per step of evaluation.")
    _directory: str = PrivateAttr(default_factory=os.getcwd)  # travels to the workers, which may have another

    @field_validator("extract")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                compiled(pattern)
            except CheckpointError as error:
                raise ValueError(str(error)) from error
        return pattern

    @model_validator(mode="after")
    def _metric_fits(self) -> "LanguageSettings":
        if self.whole_text is None and self.template is None and self.prompt is None:
            raise ValueError("name `prompt` or `template`")
        if (self.choices is not None) != (self.judged_by in CHOICES):
            raise ValueError(
                f"`metric: {self.judged_by}` {'needs' if self.choices is None else 'does not go with'} `choices`"
            )
        if self.is_unanswered and set(self.data) != {"train"}:
            raise ValueError(
                "`completion: null` is for statistics on a train split: nothing is judged without completions"
            )
        if self.extract is not None and not self.generates:
            raise ValueError("`extract` goes with metrics of what is generated")
        return self

    @property
    def whole_text(self) -> str | None:
        """Column of a text that is predicted whole; None where there are prompts."""
        return None

    @property
    def is_unanswered(self) -> bool:
        """Whether there are prompts alone."""
        return self.whole_text is None and self.choices is None and self.completion is None

    @property
    def generates(self) -> bool:
        """Whether the metric is of what is generated."""
        return self.judged_by not in (*LIKELIHOODS, *CHOICES)

    @property
    def function(self) -> str | None:
        """The user's own function that grades what is generated."""
        return self.judged_by if ":" in self.judged_by else None

    @property
    def is_percent(self) -> bool:
        """All but likelihoods, and what a function returns, are shares."""
        return self.judged_by not in LIKELIHOODS and self.function is None

    @property
    def judged_by(self) -> str:
        """The metric's name."""
        return self.metric or ("accuracy" if self.choices is not None else "log_likelihood")
