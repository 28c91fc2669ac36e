"""What a search may try: methods, subsets of members, scaling factors, parameters, and where it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import BaseTrial, FixedTrial, create_trial
from pydantic import BaseModel, ConfigDict, Field

from merging.errors import MethodError, SettingsError
from merging.methods.base import METHODS, Method, Parameter
from merging.recipe import Recipe
from merging.registry import did_you_mean
from search.domain import Domain, suggest

Granularity = Literal["shared", "per_member"]


class MethodSpace(BaseModel):
    """What to try of one method, where it differs from what the method itself declares."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scaling: Domain | None = Field(None, description="Scaling factors: a value, choices, or a range.")
    parameters: dict[str, Domain] = Field(
        default_factory=dict, description="The method's parameters, each a value, choices, or a range."
    )


@dataclass(frozen=True)
class _Searched:
    """A method with everything that may be tried of it."""

    method: Method
    scaling: Domain
    parameters: Mapping[str, Domain]


class Space:
    """Every recipe that a search may propose.

    Optuna's parameters are, in the order of suggestion: `method`, `members` (names joined by `+`),
    `<method>.<parameter>`, `<method>.scaling` (one shared factor) or `<method>.scaling.<member>`. What has
    one value only is no parameter. A method with nothing to vary has one recipe: an anchor, not proposed
    again.

    Args:
        methods: What to try of each method, by its name.
        members: All members that a merge can take.
        subsets: The subsets to choose among; by default all members, always.
        scaling: One factor for all members, or one for each.

    Raises:
        MethodError: An unknown method.
        SettingsError: An unknown parameter or member, a value that the method doesn't allow, a subset named
            twice.
    """

    def __init__(
        self,
        methods: Mapping[str, MethodSpace],
        members: Sequence[str],
        subsets: Sequence[Sequence[str]] | None = None,
        scaling: Granularity = "shared",
    ) -> None:
        if not methods or not members:
            raise SettingsError("a search needs at least one method and one member")
        self.members = tuple(sorted(members))
        self.scaling = scaling
        self._methods = {name: _searched(name, given) for name, given in methods.items()}
        self._subsets: dict[str, tuple[str, ...]] = {}
        for subset in subsets or [self.members]:
            self._add_subset(subset)
        self._proposed = tuple(
            name
            for name in self._methods
            if len(self._allowed(name)) > 1 or any(self._below(name, self._subsets[key]) for key in self._allowed(name))
        )

    @property
    def searchable(self) -> bool:
        """Whether there is anything to propose beside the anchors."""
        return bool(self._proposed)

    def suggest(self, trial: BaseTrial) -> Recipe:
        """The recipe that a trial proposes, every parameter spelled out.

        Raises:
            SettingsError: There is nothing to propose beside the anchors.
        """
        if not self.searchable:
            raise SettingsError("the search space has nothing to vary: give a method a range, or several subsets")
        values: dict[str, Any] = {}
        for name, distribution in self._choice("method", self._proposed).items():
            values[name] = suggest(trial, name, distribution)
        method = values.get("method", self._proposed[0])
        allowed, where = self._allowed(method), self._members_name(method)
        for name, distribution in self._choice(where, allowed).items():
            values[name] = suggest(trial, name, distribution)
        subset = self._subsets[values.get(where, allowed[0])]
        for name, distribution in self._below(method, subset).items():
            values[name] = suggest(trial, name, distribution)
        return self._recipe(method, subset, values)

    def distributions(self, recipe: Recipe) -> dict[str, BaseDistribution]:
        """What each of `params(recipe)` is sampled from.

        Raises:
            SettingsError: The recipe's method or subset is not in this space.
        """
        key = "+".join(recipe.members)
        if recipe.method not in self._proposed or key not in self._allowed(recipe.method):
            raise SettingsError(f"{recipe.method} of {key} is not in the search space")
        above = self._choice("method", self._proposed)
        above |= self._choice(self._members_name(recipe.method), self._allowed(recipe.method))
        return above | self._below(recipe.method, self._subsets[key])

    def params(self, recipe: Recipe) -> dict[str, Any]:
        """The values of Optuna's parameters with which `suggest` gives this recipe.

        Raises:
            MethodError: The recipe is none of its method.
            SettingsError: It is not in this space.
        """
        distributions = self.distributions(recipe)
        recipe = self._methods[recipe.method].method.complete(recipe)
        whole: dict[str, Any] = {"method": recipe.method}
        whole[self._members_name(recipe.method)] = "+".join(recipe.members)
        whole |= {f"{recipe.method}.{name}": value for name, value in recipe.parameters.items()}
        whole |= {f"{recipe.method}.scaling.{member}": factor for member, factor in recipe.scaling.items()}
        whole[f"{recipe.method}.scaling"] = recipe.scaling[recipe.members[0]]
        params = {name: whole[name] for name in distributions}
        try:
            create_trial(value=0.0, params=params, distributions=distributions)  # checks the ranges
        except ValueError as error:
            raise SettingsError(f"a recipe of {recipe.method} is not in the search space: {error}") from error
        if self.suggest(FixedTrial(params)).identity != recipe.identity:
            raise SettingsError(f"a recipe of {recipe.method} differs from what the search space fixes")
        return params

    def __contains__(self, recipe: Recipe) -> bool:
        try:
            self.params(recipe)
        except (SettingsError, MethodError):
            return False
        return True

    def anchors(self) -> list[Recipe]:
        """Where every search starts, so that none ends below it, each recipe once.

        The plain average of all members first, in the space or not; then every method at its defaults (moved
        into the space where it leaves them out) for all members, or for its first subset where it takes fewer.
        """
        found = [METHODS["average"].default_recipe(self.members)]
        for name, searched in self._methods.items():
            most = searched.method.most_members
            takes_all = most is None or len(self.members) <= most
            found.append(self._recipe(name, self.members if takes_all else self._subsets[self._allowed(name)[0]], {}))
        return list({recipe.identity: recipe for recipe in found}.values())

    def _add_subset(self, subset: Sequence[str]) -> None:
        key = "+".join(sorted(subset))
        for member in subset:
            if member not in self.members:
                raise SettingsError(
                    f"subset {key}: unknown member '{member}'. {did_you_mean(member, list(self.members))}"
                )
        if key in self._subsets or len(set(subset)) < len(subset) or not subset:
            raise SettingsError(f"subset '{key}' is empty, or names a member twice, or is there twice")
        self._subsets[key] = tuple(sorted(subset))

    def _allowed(self, method: str) -> tuple[str, ...]:
        """The subsets that a method can take.

        Raises:
            SettingsError: There is none.
        """
        declared = self._methods[method].method
        most = declared.most_members
        found = tuple(key for key, subset in self._subsets.items() if most is None or len(subset) <= most)
        if declared.solution is not None:  # there is one of all members only
            found = tuple(key for key in found if self._subsets[key] == self.members)
            if not found:
                raise SettingsError(f"method '{method}' merges all members, and no subset has them: leave it out")
        if not found:
            raise SettingsError(
                f"method '{method}' takes {most} members at most, and every subset has more: leave it out, or select "
                f"subsets of {most}"
            )
        return found

    def _members_name(self, method: str) -> str:
        """The parameter that chooses the subset: the same for all methods that can take every one."""
        return "members" if len(self._allowed(method)) == len(self._subsets) else f"{method}.members"

    def _choice(self, name: str, values: tuple[str, ...]) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(values)} if len(values) > 1 else {}

    def _below(self, method: str, subset: Sequence[str]) -> dict[str, BaseDistribution]:
        """What is chosen once method and subset are known."""
        searched = self._methods[method]
        found = {
            f"{method}.{name}": domain.distribution(_whole(searched.method.parameters[name]))
            for name, domain in searched.parameters.items()
        }
        factor = searched.scaling.distribution(whole=False)
        # Where a shared factor cancels, so does the only member's.
        if self.scaling == "shared" and not searched.method.scale_free:
            found[f"{method}.scaling"] = factor
        elif self.scaling == "per_member" and not (searched.method.scale_free and len(subset) == 1):
            found |= {f"{method}.scaling.{member}": factor for member in subset}
        return {name: distribution for name, distribution in found.items() if distribution is not None}

    def _recipe(self, method: str, subset: Sequence[str], values: Mapping[str, Any]) -> Recipe:
        """The recipe of these values; the nearest to the method's defaults where there is none."""
        searched = self._methods[method]
        shared = values.get(f"{method}.scaling", searched.scaling.nearest(searched.method.scaling.default))
        scaling = {member: values.get(f"{method}.scaling.{member}", shared) for member in subset}
        parameters = {
            name: values.get(f"{method}.{name}", domain.nearest(searched.method.parameters[name].default))
            for name, domain in searched.parameters.items()
        }
        return searched.method.complete(Recipe(method, scaling, parameters))


def _searched(name: str, given: MethodSpace) -> _Searched:
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
    return _Searched(method, _domain(f"{name}.scaling", method.scaling, given.scaling), parameters)


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


def _whole(spec: Parameter) -> bool:
    return isinstance(spec.default, int) and not isinstance(spec.default, bool)
