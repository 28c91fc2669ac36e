"""What RegMean propagated is told."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Update = Literal["propagated", "regmean++", "regmean"]


class PropagationSettings(BaseModel):
    """Settings of RegMean propagated and of its kin."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    examples: int = Field(256, ge=1, description="Unlabelled examples of each member's training split.")
    batch_size: int = Field(
        16,
        ge=1,
        description="Examples per forward pass, each with a thread of its own; changes rounding and padding only.",
    )
    recompute: bool = Field(
        False,
        description="Run every block again for each of its layers, and keep its output alone: the same solution from less "
        "memory, in about twice the time.",
    )
    ridge: float = Field(
        1e-3, ge=0, description="Pull towards the mean weights, relative to the mean of the inputs' squares."
    )
    update: Update = Field(
        "propagated",
        description="propagated: the merged model's inputs, the members' own outputs; regmean++: the merged model's "
        "inputs, the members' weights on them; regmean: the members' own inputs and outputs.",
    )
    factors: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="Member → its weight in the least squares; by default 1. Only ratios matter."
    )
