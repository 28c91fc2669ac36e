"""Optuna's samplers by name, made anew for each proposal: a resumed search goes on as an unbroken one."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

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


SAMPLERS: Mapping[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "cmaes": CmaEsSampler,
    "gp": GPSampler,
    "nsga2": NSGAIISampler,
    "nsga3": NSGAIIISampler,
    "qmc": UnionQMCSampler,
    "grid": GridSampler,
    "brute_force": BruteForceSampler,
}
"""Optuna's samplers by the name that a campaign file uses. `cmaes` and `gp` see only parameters that all
trials
share: they are for a search of one method on one subset. `grid` needs its `search_space`, and `brute_force` a
space without continuous ranges."""

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
    name: str = "tpe", seed: int = 0, arguments: Mapping[str, Any] | None = None, number: int = 0
) -> BaseSampler:
    """The sampler that proposes the parameters of one trial.

    What it learns it reads from the study: a sampler of its own for each trial proposes as well as one for
    all.

    Args:
        name: One of `SAMPLERS`.
        seed: The campaign's.
        arguments: The sampler's arguments, as Optuna names them.
        number: The trial's.

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


def _arguments(sampler: type[BaseSampler]) -> list[str]:
    """Names of the arguments that a file can give."""
    parameters = inspect.signature(sampler).parameters
    return [
        name
        for name, parameter in parameters.items()
        if name != "seed" and not any(word in str(parameter.annotation) for word in _NOT_IN_A_FILE)
    ]
