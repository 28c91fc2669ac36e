"""What campaign, recipe and slices files alike say of a pool, and its paths made absolute."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from flows.config.yaml_file import Name, Settings, resolve, resolve_checkpoint
from merging.checkpoints.vocabulary import Vocabulary
from merging.recipe import BASE


class MemberSettings(Settings):
    """A checkpoint fine-tuned from the base."""

    checkpoint: str = Field(
        description="Hugging Face model directory (config.json + safetensors), or that of a PEFT LoRA adapter of the base; "
        "or `MODEL+ADAPTER`, an adapter on another model. `ORG/NAME` or `ORG/NAME@REVISION`, where "
        "there is no directory `ORG`, is on the Hub."
    )
    statistics: tuple[str, ...] = Field(
        (), description="Statistics files that somebody published for this checkpoint; used instead of data."
    )
    task: str | None = Field(None, description="The task it was fine-tuned on; by default the task of its own name.")
    examples: int | None = Field(
        None,
        ge=1,
        description="Training examples behind it (gradient matching); by default its task's training split.",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"checkpoint": value}
        if not isinstance(value, dict | MemberSettings):
            raise ValueError("expected a checkpoint's directory, or `checkpoint:` and other settings")
        return value


def _without_base(members: dict[str, MemberSettings]) -> dict[str, MemberSettings]:
    """Members, none of which has the base's name.

    Raises:
        ValueError: One has.
    """
    if BASE in members:
        raise ValueError(f"no member may be called '{BASE}'")
    return members


BaseCheckpoint = Annotated[
    str,
    Field(description="The checkpoint that all members were fine-tuned from: a directory, an address, or `ORG/NAME`."),
]
Members = Annotated[dict[Name, MemberSettings], AfterValidator(_without_base)]
MergeVocabulary = Annotated[
    Vocabulary,
    Field(
        description="Whose tokens a merge has, where members' are not the base's: `base`, or `union`, which adds those that "
        "the base lacks. Rows of embeddings are matched by token."
    ),
]
MaxDistance = Annotated[
    float | None,
    Field(
        gt=0,
        description="Largest ‖θ_t − θ_0‖ / ‖θ_0‖ of a member: one beyond it was hardly fine-tuned from the base; null for no "
        "bound.",
    ),
]


def resolve_pool(settings: dict[str, Any], root: str, *, to_be_made: bool = False) -> None:
    """Makes the paths of a file's base and members absolute, relative to `root`.

    Args:
        settings: The file's settings as JSON has them; changed.
        root: The directory of the file.
        to_be_made: Whether members are paths that something is written to, and none of them is on the Hub.
    """
    settings["base"] = resolve_checkpoint(settings["base"], root)
    for member in settings["members"].values():
        member["checkpoint"] = (resolve if to_be_made else resolve_checkpoint)(member["checkpoint"], root)
        member["statistics"] = [resolve(file, root) for file in member["statistics"]]
