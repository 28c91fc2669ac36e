"""Recipe files: a merge that one person writes down and another repeats."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from flows.config.files_from import FilesFrom
from flows.config.mergekit import load_translated
from flows.config.pool_settings import BaseCheckpoint, MaxDistance, Members, MergeVocabulary, resolve_pool
from flows.config.yaml_file import Settings, parent, resolve, said_in, validate
from merging.checkpoints.adapters.adapter import model_and_adapter
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import MAX_DISTANCE, check_weights
from merging.checkpoints.vocabulary import Vocabulary
from merging.errors import MethodError
from merging.io import addresses, hub
from merging.mergers.material import Material, open_statistics
from merging.methods import METHODS
from merging.methods.mergekit_names import MERGEKIT_NAMES
from merging.recipe import BASE, GROUP, Recipe, Value, flat, nested
from merging.registry import did_you_mean

RECIPE = "recipe.yaml"
"""What a merged checkpoint's own recipe is called."""
LOOKED_AT = 1 << 16
"""Entries of a weight that show whether a member was fine-tuned from the base; merging looks at all for NaN and Inf."""


class RecipeFile(Settings):
    """What a merge takes."""

    base: BaseCheckpoint
    members: Members = Field(min_length=1, description="Checkpoints, with statistics files if any.")
    statistics: tuple[str, ...] = Field(
        (), description="Statistics files of these members as a whole (regmean_propagated's solution)."
    )
    base_statistics: tuple[str, ...] = Field((), description="Statistics files of the base (its Fisher).")
    base_examples: int | None = Field(None, ge=1, description="Training examples behind the base.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the merged weights; by default the base's."
    )
    export: Literal["full", "adapter"] = Field(
        "full",
        description="What is written: full weights, or, of members that are all LoRA adapters, an adapter of the base (exact "
        "for linear methods and in core space; others are refused).",
    )
    method: str = Field(description="Merge method.")
    scaling: float | dict[str, float | Annotated[dict[str, float], Field(min_length=1)]] | None = Field(
        None,
        description="One factor for all members, or one each, or one for each of a member's groups of weights "
        "(`amazon: {layers:0-2: 0.5, '*': 1.0}`); by default the method's own default.",
    )
    parameters: dict[str, Value] = Field(default_factory=dict, description="The method's parameters.")
    heads: tuple[str, ...] = Field((), description="Patterns of tensors that are not merged.")
    vocabulary: MergeVocabulary = "base"
    max_distance: MaxDistance = MAX_DISTANCE
    files_from: FilesFrom = Field(default_factory=FilesFrom, description=FilesFrom.__doc__)

    @model_validator(mode="before")
    @classmethod
    def _mergekit_names(cls, value: Any) -> Any:
        """A method by mergekit's name is ours, with what the name says of its parameters."""
        name = value.get("method") if isinstance(value, dict) else None
        given = value.get("parameters") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in MERGEKIT_NAMES or not isinstance(given, dict | None):
            return value
        method, implied = MERGEKIT_NAMES[name]
        for key, own in (given or {}).items():
            if key in implied and own != implied[key]:
                raise ValueError(
                    f"parameters.{key}: '{name}' is '{method}' with {key} = {implied[key]!r} (found {own!r})"
                )
        return {**value, "method": method, "parameters": {**implied, **(given or {})}}

    @model_validator(mode="after")
    def _files_are_somebody_s(self) -> "RecipeFile":
        self.files_from.check(self.members)
        return self

    def recipe(self) -> Recipe:
        """The recipe itself; members without a factor of their own take part with the method's default.

        Parameters that are not given are left to `Material.check`, since some defaults follow the base's architecture.

        Raises:
            MethodError: The method, a parameter or a value is unknown or out of bounds.
        """
        method = METHODS[self.method]
        default = method.default_recipe(list(self.members)).scaling
        if isinstance(self.scaling, float):
            scaling = dict.fromkeys(self.members, self.scaling)
        else:
            scaling = flat(self.scaling or {})
            named = {key.partition(GROUP)[0] for key in scaling}
            if strangers := named - set(self.members):
                hint = did_you_mean(min(strangers), list(self.members))
                raise MethodError(f"scaling: '{min(strangers)}' is no member of this recipe. {hint}")
            scaling |= {member: default[member] for member in self.members if member not in named}
        complete = method.complete(Recipe(self.method, scaling, self.parameters))
        return replace(complete, parameters={name: complete.parameters[name] for name in self.parameters})

    def pinned(self) -> "RecipeFile":
        """With the commit of every checkpoint that is on the Hub.

        Raises:
            StorageError: One cannot be had.
        """
        members = {
            name: member.model_copy(update={"checkpoint": hub.pinned(member.checkpoint)})
            for name, member in self.members.items()
        }
        return self.model_copy(update={"base": hub.pinned(self.base), "members": members})

    def material(self) -> Material:
        """Opens and checks checkpoints and statistics files.

        Raises:
            MergequestError: One of them is unusable.
        """
        pool = Pool.open(
            self.base, {name: member.checkpoint for name, member in self.members.items()}, self.heads, self.vocabulary
        )
        check_weights(pool, LOOKED_AT, self.max_distance)
        files = {name: member.statistics for name, member in self.members.items()} | {BASE: self.base_statistics}
        together = "+".join(sorted(self.members))  # of one member, its own name
        files[together] = (*files.get(together, ()), *self.statistics)
        statistics = open_statistics(pool, files)
        counts = {name: member.examples for name, member in self.members.items()} | {BASE: self.base_examples}
        examples = {name: count for name, count in counts.items() if count}
        return Material(pool, statistics, examples)


def load_recipe(path: str) -> RecipeFile:
    """A recipe file, its paths made absolute, relative to the file; a mergekit configuration becomes one.

    Raises:
        SettingsError: It is missing, or something in it is wrong: every mistake is in the message.
    """
    root = parent(path)
    given = validate(RecipeFile, load_translated(path), path)
    settings = given.model_dump(mode="json")
    with said_in(path):
        resolve_pool(settings, root)
        settings["statistics"] = [resolve(file, root) for file in given.statistics]
        settings["base_statistics"] = [resolve(file, root) for file in given.base_statistics]
    return validate(RecipeFile, settings, path)


def dump_recipe(
    base: str,
    members: Mapping[str, tuple[str, tuple[str, ...]]],
    recipe: Recipe,
    statistics: Sequence[str] = (),
    *,
    base_statistics: Sequence[str] = (),
    examples: Mapping[str, int] | None = None,
    heads: Sequence[str] = (),
    vocabulary: Vocabulary = "base",
    max_distance: float | None = MAX_DISTANCE,
    files_from: FilesFrom | None = None,
    dtype: str | None = None,
    export: str = "full",
    directory: str | None = None,
) -> str:
    """A recipe file that repeats a candidate's merge.

    Args:
        base: The base's directory.
        members: Member → its directory and its statistics files.
        recipe: The candidate's recipe.
        statistics: Statistics files of these members as a whole.
        base_statistics: Statistics files of the base.
        examples: Member, or `base` → number of training examples behind it, where that is known.
        heads: Patterns of tensors that are not merged.
        vocabulary: Whose tokens the merge has.
        max_distance: Largest distance of a member from the base; None for no bound.
        files_from: Whose small files the merge has.
        dtype: Of the merged weights; None for the base's.
        export: What is written.
        directory: Where the file will lie, which names local paths from there; None leaves them as they are.
    """
    known = examples or {}
    borrowed = files_from.model_dump(exclude_defaults=True) if files_from else {}

    def seen(path: str) -> str:
        return path if directory is None else seen_from(path, directory)

    value: dict[str, Any] = {
        "base": seen(base),
        "members": {
            name: {"checkpoint": seen(members[name][0])}
            | ({"statistics": [seen(file) for file in members[name][1]]} if members[name][1] else {})
            | ({"examples": known[name]} if name in known else {})
            for name in recipe.members
        },
        "statistics": [seen(file) for file in statistics],
        "base_statistics": [seen(file) for file in base_statistics],
        "base_examples": known.get(BASE),
        "heads": list(heads),
        "vocabulary": vocabulary if vocabulary != "base" else None,
        "max_distance": max_distance,
        "dtype": dtype,
        "export": export if export != "full" else None,
        "files_from": {key: name for key, name in borrowed.items() if name in recipe.members},
        **recipe.as_dict(),
        "scaling": nested(recipe.scaling),
    }
    always: tuple[str, ...] = ("method", "scaling", "parameters")
    if max_distance != MAX_DISTANCE:
        always = ("max_distance", *always)
    order = (
        "base",
        "members",
        "statistics",
        "base_statistics",
        "base_examples",
        "heads",
        "vocabulary",
        "files_from",
        "dtype",
        "export",
        *always,
    )
    shown = {key: value[key] for key in order if value[key] or key in always}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def seen_from(path: str, directory: str) -> str:
    """A path as seen from a directory that may be given away: nothing of where that lies on this machine."""
    if on_model := model_and_adapter(path):
        return "+".join(seen_from(part, directory) for part in on_model)
    if not addresses.is_local(path) or hub.is_hub(path):
        return path
    if not addresses.is_local(directory):
        return addresses.base_name(path)
    return os.path.relpath(addresses.absolute(path), addresses.absolute(directory))
