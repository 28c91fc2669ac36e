"""Recipe files: a merge that one person writes down and another repeats."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import Field

from flows.config import MemberSettings, Name, Settings, load_yaml, parent, resolve, validate
from merging.errors import MethodError
from merging.merge import Material, open_statistics
from merging.methods import METHODS
from merging.pool import Pool
from merging.recipe import Recipe, Value
from merging.registry import did_you_mean


class RecipeFile(Settings):
    """What a merge takes."""

    base: str = Field(description="The checkpoint that all members were fine-tuned from.")
    members: dict[Name, MemberSettings] = Field(min_length=1, description="Checkpoints, with statistics files if any.")
    statistics: tuple[str, ...] = Field(
        (), description="Statistics files of these members as a whole (regmean_propagated's solution)."
    )
    method: str = Field(description="Merge method.")
    scaling: float | dict[str, float] | None = Field(
        None, description="One factor for all members, or one each; by default the method's own default."
    )
    parameters: dict[str, Value] = Field(default_factory=dict, description="The method's parameters.")
    heads: tuple[str, ...] = Field((), description="Patterns of tensors that are not merged.")

    def recipe(self) -> Recipe:
        """The recipe itself; members without a factor of their own take part with the method's default.

        Raises:
            MethodError: The method, a parameter or a value is unknown or out of bounds.
        """
        method = METHODS[self.method]
        default = float(method.scaling.default)
        if isinstance(self.scaling, dict) and (strangers := set(self.scaling) - set(self.members)):
            hint = did_you_mean(min(strangers), list(self.members))
            raise MethodError(f"scaling: '{min(strangers)}' is no member of this recipe. {hint}")
        if self.scaling is None or isinstance(self.scaling, dict):
            given: Mapping[str, float] = self.scaling or {}
            scaling = {member: given.get(member, default) for member in self.members}
        else:
            scaling = dict.fromkeys(self.members, self.scaling)
        return method.complete(Recipe(self.method, scaling, self.parameters))

    def material(self) -> Material:
        """Opens and checks checkpoints and statistics files.

        Raises:
            MergequestError: One of them is unusable.
        """
        pool = Pool.open(self.base, {name: member.checkpoint for name, member in self.members.items()}, self.heads)
        pool.check_weights()
        files = {name: member.statistics for name, member in self.members.items()}
        statistics = open_statistics(pool, {**files, "+".join(sorted(self.members)): self.statistics})
        examples = {name: member.examples for name, member in self.members.items() if member.examples}
        return Material(pool, statistics, examples)


def load_recipe(path: str) -> RecipeFile:
    """A recipe file, its paths made absolute, relative to the file.

    Raises:
        SettingsError: It is missing, or something in it is wrong: every mistake is in the message.
    """
    root = parent(path)
    given = validate(RecipeFile, load_yaml(path), path)
    settings = given.model_dump(mode="json")
    settings["base"] = resolve(given.base, root)
    settings["statistics"] = [resolve(file, root) for file in given.statistics]
    for member in settings["members"].values():
        member["checkpoint"] = resolve(member["checkpoint"], root)
        member["statistics"] = [resolve(file, root) for file in member["statistics"]]
    return validate(RecipeFile, settings, path)


def dump_recipe(
    base: str, members: Mapping[str, tuple[str, tuple[str, ...]]], recipe: Recipe, statistics: Sequence[str] = ()
) -> str:
    """A recipe file that repeats a candidate's merge.

    Args:
        base: The base's directory.
        members: Member → its directory and its statistics files.
        recipe: The candidate's recipe.
        statistics: Statistics files of these members as a whole.
    """
    value: dict[str, Any] = {
        "base": base,
        "members": {
            name: {"checkpoint": members[name][0]}
            | ({"statistics": list(members[name][1])} if members[name][1] else {})
            for name in recipe.members
        },
        "statistics": list(statistics),
        **recipe.as_dict(),
    }
    order = ("base", "members", "statistics", "method", "scaling", "parameters")
    shown = {key: value[key] for key in order if key != "statistics" or statistics}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
