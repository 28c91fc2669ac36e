"""What a search may try: methods, subsets of members, scaling factors, parameters, and where it starts."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import BaseTrial, FixedTrial, create_trial

from merging.errors import MethodError, SettingsError
from merging.io import hashing
from merging.mergers.weight_groups import collapsed, factor
from merging.methods.method import METHODS
from merging.recipe import GROUP, Recipe
from merging.registry import did_you_mean
from search.space.method_space import Declared, Granularity, MethodSpace, declared, is_whole
from search.space.ranges import suggest


class Space:
    """Every recipe that a search may propose.

    Optuna's parameters are, in the order of suggestion: `method`, `members` (names joined by `+`),
    `<method>.<parameter>`, `<method>.scaling` (one shared factor), `<method>.scaling.<member>`, or
    `<method>.scaling.<member>@<group>`. What has one value only is no parameter. A method with nothing to
    vary has one recipe: a baseline, not proposed again. A member whose groups all have the same factor has
    one plain factor in the recipe, so that a merge has one identity however finely it was searched.

    Args:
        methods: What to try of each method, by its name.
        members: All members that a merge can take.
        subsets: The subsets to choose among; by default all members, always.
        scaling: What has a factor of its own.
        groups: Groups of weights, with every weight once (see `weight_groups`): each member has a factor in
            each; none where it has one factor, or all share one.
        starts: Recipes that are measured before anything is proposed, beside the methods' defaults.

    Raises:
        MethodError: An unknown method.
        SettingsError: An unknown parameter, member or group, a value that the method doesn't allow, a subset
            named twice.
    """

    def __init__(
        self,
        methods: Mapping[str, MethodSpace],
        members: Sequence[str],
        subsets: Sequence[Sequence[str]] | None = None,
        scaling: Granularity = "shared",
        groups: Sequence[str] = (),
        starts: Sequence[Recipe] = (),
    ) -> None:
        if not methods or not members:
            raise SettingsError("a search needs at least one method and one member")
        self.members = tuple(sorted(members))
        self.scaling = scaling
        self.groups = tuple(groups)
        self._starts = tuple(starts)
        self._methods = {name: declared(name, given) for name, given in methods.items()}
        for name, given in methods.items():
            self._check_keys(name, given)
        self._subsets: dict[str, tuple[str, ...]] = {}
        self._allows: dict[str, tuple[str, ...]] = {}
        self._choices: dict[str, dict[str, BaseDistribution]] = {}
        for subset in subsets or [self.members]:
            self._add_subset(subset)
        self._proposed = tuple(
            name
            for name in self._methods
            if len(self._allowed(name)) > 1 or any(self._below(name, self._subsets[key]) for key in self._allowed(name))
        )

    @property
    def searchable(self) -> bool:
        """Whether there is anything to propose beside the baselines."""
        return bool(self._proposed)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of what decides which parameters trials have and which recipes come of them."""
        domains = {
            name: {
                "scaling": known.scaling.model_dump(),
                "scaling_of": {key: domain.model_dump() for key, domain in known.scaling_of.items()},
                "parameters": {key: domain.model_dump() for key, domain in known.parameters.items()},
                "subsets": self._allowed(name),
                "example": self._recipe(name, self._subsets[self._allowed(name)[0]], {}).identity,
            }
            for name, known in self._methods.items()
        }
        return hashing.fingerprint(
            [self.members, list(self._subsets), self.scaling, self.groups, list(domains), domains]
        )

    def suggest(self, trial: BaseTrial) -> Recipe:
        """The recipe that a trial proposes, every parameter spelled out.

        Raises:
            SettingsError: There is nothing to propose beside the baselines.
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
        members = self._choice(self._members_name(recipe.method), self._allowed(recipe.method))
        return above | members | self._below(recipe.method, self._subsets[key])

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
        for member in recipe.members:
            keys = {member: None, **{f"{member}{GROUP}{group}": group for group in self.groups}}
            for key, group in keys.items():
                value = recipe.scaling.get(member) if group is None else factor(recipe.scaling, member, group)
                whole[f"{recipe.method}.scaling.{key}"] = value
        whole[f"{recipe.method}.scaling"] = recipe.scaling.get(recipe.members[0])
        params = {name: whole[name] for name in distributions}
        if None in params.values():
            raise SettingsError(f"a recipe of {recipe.method} has factors of other groups than the search space")
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

    def baselines(self) -> list[Recipe]:
        """Where every search starts, so that the winner is never worse than these on validation, each recipe once.

        The plain average of all members first, in the space or not; then the starts that were given; then every method
        at its defaults (moved into the space where it leaves them out) for all members, or for its first subset where
        it takes fewer, those that know most of the members first.
        """
        recipes = [METHODS["average"].default_recipe(self.members), *self._starts]
        for name, searched in sorted(self._methods.items(), key=lambda entry: _knowledge(entry[1]), reverse=True):
            most = searched.method.most_members
            takes_all = most is None or len(self.members) <= most
            recipes.append(self._recipe(name, self.members if takes_all else self._subsets[self._allowed(name)[0]], {}))
        return list({recipe.identity: recipe for recipe in recipes}.values())

    def keys(self, recipe: Recipe) -> tuple[str, ...]:
        """The keys of the scaling factors that the search varies for a recipe's members."""
        return tuple(
            self._methods[recipe.method].factors(recipe.members, () if self.scaling == "shared" else self.groups)
        )

    def nearest(self, recipe: Recipe) -> Recipe:
        """A recipe with factors for each of `keys(recipe)`, moved into their ranges."""
        searched = self._methods[recipe.method]
        if self.scaling == "shared":
            scaling = {key: float(searched.scaling.nearest(value)) for key, value in recipe.scaling.items()}
        else:
            domains = searched.factors(recipe.members, self.groups)
            scaling = collapsed({key: float(domains[key].nearest(recipe.scaling[key])) for key in domains})
        return Recipe(recipe.method, scaling, recipe.parameters)

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

    def _check_keys(self, method: str, given: MethodSpace) -> None:
        """Whether single factors that are given can be searched here."""
        if given.scaling_of and self.scaling == "shared":
            raise SettingsError(f"'{method}' has `scaling_of`, and all members share one factor: use per_member")
        known = [*self.members, *(f"{member}{GROUP}{group}" for member in self.members for group in self.groups)]
        for key in given.scaling_of:
            if key not in known:
                raise SettingsError(
                    f"{method}.scaling_of: '{key}' is no member, nor a group of one. {did_you_mean(key, known)}"
                )

    def _allowed(self, method: str) -> tuple[str, ...]:
        """The subsets that a method can take, found once: there may be thousands.

        Raises:
            SettingsError: There is none.
        """
        if method not in self._allows:
            self._allows[method] = self._find_allowed(method)
        return self._allows[method]

    def _find_allowed(self, method: str) -> tuple[str, ...]:
        most = self._methods[method].method.most_members
        keys = tuple(key for key, subset in self._subsets.items() if most is None or len(subset) <= most)
        if self._methods[method].takes_solution:  # there is one of all members only
            keys = tuple(key for key in keys if self._subsets[key] == self.members)
            if not keys:
                raise SettingsError(f"method '{method}' merges all members, and no subset has them: leave it out")
        if not keys:
            raise SettingsError(
                f"method '{method}' takes {most} members at most, and every subset has more: leave it out, or select "
                f"subsets of {most}"
            )
        return keys

    def _members_name(self, method: str) -> str:
        """The parameter that chooses the subset: the same for all methods that can take every one."""
        return "members" if len(self._allowed(method)) == len(self._subsets) else f"{method}.members"

    def _choice(self, name: str, values: tuple[str, ...]) -> dict[str, BaseDistribution]:
        if name not in self._choices:
            self._choices[name] = {name: CategoricalDistribution(values)} if len(values) > 1 else {}
        return self._choices[name]

    def _below(self, method: str, subset: Sequence[str]) -> dict[str, BaseDistribution]:
        """What is chosen once method and subset are known."""
        searched = self._methods[method]
        distributions = {
            f"{method}.{name}": domain.distribution(is_whole(searched.method.parameters[name]))
            for name, domain in searched.parameters.items()
        }
        # Where a shared factor cancels, so does the only member's.
        if self.scaling != "shared" and not (searched.method.scale_free and len(subset) == 1):
            factors = searched.factors(subset, self.groups)
            distributions |= {
                f"{method}.scaling.{key}": domain.distribution(whole=False) for key, domain in factors.items()
            }
        elif self.scaling == "shared" and not searched.method.scale_free:
            distributions[f"{method}.scaling"] = searched.scaling.distribution(whole=False)
        return {name: distribution for name, distribution in distributions.items() if distribution is not None}

    def _recipe(self, method: str, subset: Sequence[str], values: Mapping[str, Any]) -> Recipe:
        """The recipe of these values; the nearest to the method's defaults where there is none."""
        searched = self._methods[method]
        default = next(iter(searched.method.default_recipe(subset).scaling.values()))
        if self.scaling == "shared":
            scaling = dict.fromkeys(subset, values.get(f"{method}.scaling", searched.scaling.nearest(default)))
        else:
            factors = searched.factors(subset, self.groups)
            given = {key: values.get(f"{method}.scaling.{key}", d.nearest(default)) for key, d in factors.items()}
            scaling = collapsed(given)
        parameters = {
            name: values.get(f"{method}.{name}", domain.nearest(searched.method.parameters[name].default))
            for name, domain in searched.parameters.items()
        }
        return searched.method.complete(Recipe(method, scaling, parameters))


def _knowledge(searched: Declared) -> tuple[bool, int]:
    """What a method is told of the members besides their weights: their outputs, or so many kinds of statistic."""
    return searched.takes_solution, len(searched.method.requires)
