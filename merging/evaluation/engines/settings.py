"""What a campaign says of the engine that holds candidates."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineSettings(BaseModel):
    """What holds a candidate's weights and answers. `engine: vllm` alone will do (docs/engines.md)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="transformers: live models, for every kind of task; vllm: an engine in every evaluator, for `causal_lm` "
        "and `lm_eval`.",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="vllm: processes, each with a GPU, that a model's matrices are cut over."
    )
    bucket: int = Field(
        256,
        ge=1,
        description="vllm: megabytes of weights that are handed to the engine at a time (one tensor at least).",
    )
    cache: float = Field(1.0, gt=0, description="vllm: GB of its cache of keys and values, in each of its processes.")
