"""What a user may set of a distillation."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class DistillationSettings(BaseModel):
    """How members' outputs are distilled into a merged model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int | None = Field(
        None,
        ge=1,
        description="Steps of AdamW on all merged weights; by default one pass over all inputs, but at least 400 and at most "
        "2,000 steps (100 and 500 where every token has a target), and never more than ten passes.",
    )
    batch: int = Field(32, ge=1, description="Unlabelled train examples a step, shuffled over all members.")
    at_once: int | None = Field(
        None,
        ge=1,
        description="Examples of one member that run at once; by default all of a part's. Gradients are accumulated, so that "
        "fewer take less memory and change rounding only.",
    )
    learning_rate: float = Field(
        5e-5, gt=0, description="Of AdamW at its peak: it rises linearly from 0 and falls linearly to 0."
    )
    warm_up: float = Field(0.1, ge=0, le=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    examples: int | None = Field(
        None, ge=2, description="Train examples of each member that are used at most; by default all."
    )
    held_out: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of each member's examples, at most 128, that is not trained on: the weights that it likes best are "
        "kept, and distillation stops early by it. 0: all are trained on, to the end.",
    )
    evaluations: int = Field(8, ge=1, description="How often the held-out examples are looked at.")
    patience: int = Field(3, ge=1, description="Stop after so many looks in a row that were no better than the best.")
    temperature: float = Field(1.0, gt=0, description="Of teachers and model.")
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Member → its own temperature, where it is another."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Member → its weight in the loss; by default 1. Only ratios matter."
    )
    hidden: float = Field(
        0.0,
        ge=0,
        description="Weight of the last hidden states' distance (relative, squared) beside the outputs' divergence; above 0 "
        "teachers run live.",
    )
    top_k: int | None = Field(
        64,
        ge=1,
        description="Of more classes than these (a vocabulary) a teacher's likeliest are kept, and all others as one class; "
        "null for every class.",
    )
    targets: Literal["completion", "all"] = Field(
        "completion", description="Which tokens of a causal language model's examples count: completions, or all."
    )
    rank: int | None = Field(
        None, ge=1, description="Train low-rank additions (LoRA) of this rank to every matrix instead of all weights."
    )
    teachers: Literal["cached", "live"] = Field(
        "cached",
        description="cached: each member runs once over its examples, and its outputs are kept on disk; live: all members stay "
        "in memory and run in every step, where outputs are too large to be kept.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the forward pass (bfloat16 is autocast; weights and sums stay float32); auto: bfloat16 on a GPU that "
        "has it.",
    )
    parts: int = Field(
        2,
        ge=1,
        description="Into how many parts a step is cut, which workers compute side by side: at most so many work.",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of the order of examples.")
