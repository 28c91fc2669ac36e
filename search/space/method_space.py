"""What may be tried of one method: its own declarations, with what a campaign file gives instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from merging.errors import MethodError, SettingsError
from merging.mergers.weight_groups import depth_groups, pattern_groups
from merging.methods.method import METHODS, Method, Parameter
from merging.recipe import GROUP
from merging.registry import did_you_mean
from search.space.ranges import Domain

Granularity = Literal["shared", "per_member", "per_depth", "per_layer", "per_pattern"]
"""What has a scaling factor of its own: all members together, every member, or every member in every group of weights."""


class MethodSpace(BaseModel):
    """What to try of one method, where it differs from what the method itself declares."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scaling: Domain | None = Field(None, description="Scaling factors: a value, choices, or a range.")
    scaling_of: dict[str, Domain] = Field(
        default_factory=dict,
        description="The same for single members (`amazon`) or their groups of weights (`amazon@layers:0-2`).",
    )
    parameters: dict[str, Domain] = Field(
        default_factory=dict, description="The method's parameters, each a value, choices, or a range."
    )


@dataclass(frozen=True)
class Declared:
    """A method with everything that may be tried of it."""

    method: Method
    scaling: Domain
    scaling_of: Mapping[str, Domain]
    parameters: Mapping[str, Domain]

    @property
    def takes_solution(self) -> bool:
        """Whether some merge that may be tried takes a solution of its members as a whole."""
        usual = {key: spec.default for key, spec in self.method.parameters.items()}
        tried = [{**usual, key: value} for key, domain in self.parameters.items() for value in domain.values]
        return any(self.method.needs(parameters).whole for parameters in tried or [usual])

    def factor(self, member: str, group: str | None) -> Domain:
        """What may be tried for a member's factor in a group: what is given for the narrowest of all that it is part of."""
        own = self.scaling_of.get(member, self.scaling)
        return own if group is None else self.scaling_of.get(f"{member}{GROUP}{group}", own)

    def factors(self, members: Sequence[str], groups: Sequence[str]) -> dict[str, Domain]:
        """What may be tried for every member, in every group where there are any, by the factor's key in a recipe."""
        if not groups:
            return {member: self.factor(member, None) for member in members}
        return {f"{member}{GROUP}{group}": self.factor(member, group) for member in members for group in groups}


def weight_groups(scaling: Granularity, names: Sequence[str], count: int, patterns: Sequence[str]) -> tuple[str, ...]:
    """The groups of weights in which each member has a factor of its own; none where it has one for all weights.

    Args:
        scaling: What has a factor of its own.
        names: All merged weights.
        count: Into how many groups `per_depth` divides the layers; at most one per layer.
        patterns: The groups of `per_pattern`.

    Raises:
        MethodError: The weights have no layers; a pattern has no weight, or one that another has too.
    """
    match scaling:
        case "per_depth":
            return depth_groups(names, count)
        case "per_layer":
            return depth_groups(names)
        case "per_pattern":
            return pattern_groups(names, patterns)
    return ()


def declared(name: str, given: MethodSpace) -> Declared:
    """A method's own declarations with what the user gives instead."""
    method = METHODS[name]
    for parameter in given.parameters:
        if parameter not in method.parameters:
            hint = did_you_mean(parameter, list(method.parameters)) if method.parameters else "It has none."
            raise SettingsError(f"method '{name}' has no parameter '{parameter}'. {hint}")
    parameters = {
        parameter: _domain(f"{name}.{parameter}", spec, given.parameters.get(parameter))
        for parameter, spec in method.parameters.items()
    }
    scaling = _domain(f"{name}.scaling", method.scaling, given.scaling)
    scaling_of = {
        key: _domain(f"{name}.scaling_of.{key}", method.scaling, own) for key, own in given.scaling_of.items()
    }
    return Declared(method, scaling, scaling_of, parameters)


def _domain(name: str, spec: Parameter, given: Domain | None) -> Domain:
    """What may be tried for a parameter; it keeps its default where neither method nor user names a range."""
    if given is not None:
        try:
            for value in given.values:
                spec.check(name, value)
        except MethodError as error:
            raise SettingsError(f"search space: {error}") from error
        if given.low is not None and spec.choices is not None:
            raise SettingsError(f"search space: {name} takes one of its choices, not a range")
        return given
    if not spec.search:
        return Domain(value=spec.default)
    if spec.choices is not None:
        return Domain(choices=spec.choices)
    if spec.low is not None and spec.high is not None:
        return Domain(low=spec.low, high=spec.high, log=spec.log)
    return Domain(value=spec.default)


def is_whole(spec: Parameter) -> bool:
    """Whether a parameter takes whole numbers."""
    return isinstance(spec.default, int) and not isinstance(spec.default, bool)
