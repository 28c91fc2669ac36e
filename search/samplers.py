"""Optuna's samplers by name, made anew for each proposal: a resumed search goes on as an unbroken one."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial

from merging.errors import SettingsError
from merging.registry import did_you_mean
from search.quality_diversity import QualityDiversitySampler
from search.selection import Selection, select


class UnionQMCSampler(QMCSampler):
    """Optuna's quasi-Monte Carlo over every parameter seen so far, in the sequence at the trial's number.

    Optuna's own takes the first trial's parameters, which are a few of many in a conditional space, and
    counts places in the study, where a killed trial would leave a hole.
    """

    _position = 0

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of all earlier trials."""
        earlier = [past for past in study.get_trials(deepcopy=False) if past.number < trial.number]
        found = {name: entry for past in earlier for name, entry in past.distributions.items()}
        return {name: found[name] for name in sorted(found) if not found[name].single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point of the sequence that belongs to this trial."""
        self._position = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._position


class _OneOfEachKind:
    """A study that shows one trial of those with the same parameters: the first."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, *arguments: Any, **named: Any) -> list[FrozenTrial]:
        found: dict[frozenset[str], FrozenTrial] = {}
        for trial in self._study._get_trials(*arguments, **named):
            found.setdefault(frozenset(trial.distributions), trial)
        return list(found.values())


class ChosenMethodTPESampler(TPESampler):
    """Optuna's TPE in groups, which models the chosen method's parameters only.

    Optuna's own samples the groups of all methods for every proposal, and then uses one; and it looks for groups in
    every trial, where one of each kind says as much.
    """

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the trials that it sees."""
        return super().infer_relative_search_space(cast(Study, _OneOfEachKind(study)), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What all methods share, then what the method that came of it has of its own."""
        if not self._group:
            return super().sample_relative(study, trial, search_space)
        shared = {name: entry for name, entry in search_space.items() if "." not in name}
        found = super().sample_relative(study, trial, shared)
        prefix = f"{found['method']}." if "method" in found else ""
        own = {n: entry for n, entry in search_space.items() if n not in shared and n.startswith(prefix)}
        return found | super().sample_relative(study, trial, own)


SAMPLERS: Mapping[str, type[BaseSampler]] = {
    "tpe": ChosenMethodTPESampler,
    "random": RandomSampler,
    "cmaes": CmaEsSampler,
    "gp": GPSampler,
    "nsga2": NSGAIISampler,
    "nsga3": NSGAIIISampler,
    "qmc": UnionQMCSampler,
    "grid": GridSampler,
    "brute_force": BruteForceSampler,
    "quality_diversity": QualityDiversitySampler,
}
"""Samplers by the name that a campaign file uses, all but the last Optuna's own. `cmaes` and `gp` see only parameters
that all trials share: they are for a search of one method on one subset. `grid` needs its `search_space`, and
`brute_force` a space without continuous ranges. `quality_diversity` draws subsets of members by q and S of the
selection, and the rest by another of these."""

QUALITY_DIVERSITY = "quality_diversity"

SINGLE_OBJECTIVE = frozenset({"cmaes"})
"""Those that refuse to maximise several objectives at once."""

READ_EVERYTHING = frozenset({"tpe", "gp", "cmaes", "quality_diversity"})
"""Those whose proposals take longer with every finished trial that they see, and that need not see all: `cmaes` its last
two generations. Evolution (`nsga2`, `nsga3`) needs parents however old they are, and `qmc` every parameter ever seen."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # one joint density for each method's own parameters, instead of none for all that methods don't share
    "tpe": {"multivariate": True, "group": True, "constant_liar": True},
    "cmaes": {"warn_independent_sampling": False},
    "gp": {"warn_independent_sampling": False},
    "qmc": {"warn_independent_sampling": False},
}
_NOT_IN_A_FILE = ("Callable", "Sampler", "Mutation", "Crossover", "FrozenTrial", "ndarray")


def ask_seed(seed: int, number: int) -> int:
    """The seed of one proposal: a function of the campaign's seed and the trial's number alone."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def make_sampler(
    name: str = "tpe",
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    number: int = 0,
    selection: Selection | None = None,
) -> BaseSampler:
    """The sampler that proposes the parameters of one trial.

    What it learns it reads from the study: a sampler of its own for each trial proposes as well as one for
    all.

    Args:
        name: One of `SAMPLERS`.
        seed: The campaign's.
        arguments: The sampler's arguments, as Optuna names them.
        number: The trial's.
        selection: The members' q and S, for `quality_diversity`, whose further arguments are `sampler` (the name of
            the one for all other parameters, `tpe` by default) and `sampler_arguments`.

    Raises:
        SettingsError: Unknown sampler or argument, or a value that the sampler refuses.
    """
    if name not in SAMPLERS:
        raise SettingsError(f"unknown sampler '{name}'. {did_you_mean(name, list(SAMPLERS))}")
    known = _arguments(SAMPLERS[name])
    for argument in arguments or {}:
        if argument not in known:
            hint = did_you_mean(argument, known) if known else "It takes none."
            raise SettingsError(f"sampler '{name}' has no argument '{argument}'. {hint}")
    if name == QUALITY_DIVERSITY:
        return _quality_diversity(seed, dict(arguments or {}), number, selection or select(["all"], "all"))
    chosen = {**DEFAULTS.get(name, {}), **(arguments or {}), "seed": ask_seed(seed, number)}
    if name in ("grid", "qmc"):
        chosen["seed"] = seed  # of the order of the whole grid, of the whole sequence
    if name == "qmc":
        chosen["independent_sampler"] = RandomSampler(ask_seed(seed, number))
    if name == "grid" and "search_space" not in chosen:
        raise SettingsError("sampler 'grid' needs the argument 'search_space': each parameter's name and its values")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return SAMPLERS[name](**chosen)
    except ImportError as error:
        raise SettingsError(f"sampler '{name}' needs a package that is not installed: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise SettingsError(f"sampler '{name}' refuses its arguments: {error}") from error


def _quality_diversity(seed: int, arguments: dict[str, Any], number: int, selection: Selection) -> BaseSampler:
    """The sampler on a selection's members; equal q, and members that differ, where it has neither q nor S."""
    names = selection.names
    inner = arguments.pop("sampler", "tpe")
    if inner == QUALITY_DIVERSITY:
        raise SettingsError(f"sampler '{QUALITY_DIVERSITY}' needs another one for all but the subset, not itself")
    wrapped = make_sampler(inner, seed, arguments.pop("sampler_arguments", None), number)
    similarity = np.eye(len(names)) if selection.similarity is None else selection.similarity
    try:
        return QualityDiversitySampler(
            similarity,
            names,
            sampler=wrapped,
            quality=selection.quality or None,
            strata="method",
            seed=ask_seed(seed, number),
            **arguments,
        )
    except TypeError as error:
        raise SettingsError(f"sampler '{QUALITY_DIVERSITY}' refuses its arguments: {error}") from error


def _arguments(sampler: type[BaseSampler]) -> list[str]:
    """Names of the arguments that a file can give."""
    if sampler is QualityDiversitySampler:
        return ["sampler", "sampler_arguments", "learn_sizes", "strength", "shrinkage"]
    parameters = inspect.signature(sampler).parameters
    return [
        name
        for name, parameter in parameters.items()
        if name != "seed" and not any(word in str(parameter.annotation) for word in _NOT_IN_A_FILE)
    ]
