"""Slices files: a model made of layers of base and members, one after another."""

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from flows.config.files_from import FilesFrom
from flows.config.mergekit import is_passthrough, load_translated
from flows.config.pool_settings import Members, resolve_pool
from flows.config.recipe_file import seen_from
from flows.config.yaml_file import Settings, parent, said_in, validate
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.checkpoints.vocabulary import Vocabulary
from merging.errors import MethodError
from merging.mergers.slices import Slice, layers
from merging.recipe import BASE


class SliceSettings(Settings):
    """Consecutive layers of one model."""

    source: str = Field(description="A member, or `base`.")
    layers: int | str = Field(description="`3`, `0-11`, or `12-` to the end; counted from 0, the last belongs to it.")
    scale: float | dict[str, float] = Field(
        1.0,
        description="What the weights are multiplied by: a number for all, or one for each pattern of names "
        "(`{'*.o_proj.weight': 0}`).",
    )

    @field_validator("layers")
    @classmethod
    def _are_layers(cls, value: int | str) -> int | str:
        try:
            layers(str(value))
        except MethodError as error:
            raise ValueError(str(error)) from error
        return value

    def slice(self) -> Slice:
        """The slice itself."""
        scale = self.scale if isinstance(self.scale, dict) else {} if self.scale == 1 else {"*": self.scale}
        return Slice(self.source, *layers(str(self.layers)), scale)


class SlicesFile(Settings):
    """What a model of slices takes; no merge method, no scaling factors."""

    base: str = Field(description="The checkpoint that says what the model is like: configuration, tokenizer, names.")
    members: Members = Field(
        default_factory=dict, description="Checkpoints fine-tuned from it, none where all layers are its own."
    )
    slices: tuple[SliceSettings, ...] = Field(min_length=1, description="The layers, from the first to the last.")
    rest: str | dict[str, str] = Field(
        BASE,
        description="Whose embeddings, last norm and head: a member, or `base`; or one for each pattern of names, of which the "
        "first that fits counts (`{'*embed*': amazon, '*': base}`).",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the written weights; by default the base's."
    )
    heads: tuple[str, ...] = Field((), description="Patterns of tensors that are not taken from members.")
    vocabulary: Vocabulary = Field("base", description="Whose tokens the model has: see recipe files.")
    files_from: FilesFrom = Field(default_factory=FilesFrom, description=FilesFrom.__doc__)

    def pool(self) -> Pool:
        """Opens and compares the checkpoints.

        Raises:
            MergequestError: One of them is unusable.
        """
        self.files_from.check(self.members)
        paths = {name: member.checkpoint for name, member in self.members.items()}
        if paths:
            return Pool.open(self.base, paths, self.heads, self.vocabulary)
        base = Checkpoint.open(self.base)
        weights = {name: info for name, info in base.tensors.items() if info.dtype.is_floating_point}
        return Pool(base, {}, weights)

    def dump(self, directory: str) -> str:
        """The file that repeats this, its local paths as seen from a directory."""
        value = self.model_dump(mode="json", exclude_defaults=True)
        value["base"] = seen_from(self.base, directory)
        if self.members:
            value["members"] = {name: seen_from(one.checkpoint, directory) for name, one in self.members.items()}
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def is_slices(given: Mapping[str, Any]) -> bool:
    """Whether a YAML file's mapping is a slices file, or a configuration of mergekit's that becomes one."""
    return is_passthrough(given) or ("slices" in given and "merge_method" not in given)


def load_slices(path: str) -> SlicesFile:
    """A slices file, its paths made absolute, relative to the file.

    Raises:
        SettingsError: It is missing, or something in it is wrong: every mistake is in the message.
    """
    root = parent(path)
    given = validate(SlicesFile, load_translated(path), path)
    settings = given.model_dump(mode="json")
    with said_in(path):
        resolve_pool(settings, root)
    return validate(SlicesFile, settings, path)
