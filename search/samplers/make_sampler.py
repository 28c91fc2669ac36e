"""Optuna's samplers by name, made anew for each proposal: a resumed search goes on as an unbroken one."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    GPSampler,
    GridSampler,
    RandomSampler,
)
from optuna.trial import FrozenTrial, TrialState

from merging.errors import SettingsError
from merging.registry import did_you_mean
from search.samplers.foreign import is_foreign, make_foreign
from search.samplers.history_window import Generations, Mark, Memory, NewParameters, Recent
from search.samplers.optuna_variants import (
    BreedingNSGAIIISampler,
    BreedingNSGAIISampler,
    ChosenMethodTPESampler,
    NumbersCmaEsSampler,
    UnionQMCSampler,
    bred,
)
from search.samplers.quality_diversity import QualityDiversitySampler
from search.subsets.choose_subsets import Selection, select

SAMPLERS: Mapping[str, type[BaseSampler]] = {
    "tpe": ChosenMethodTPESampler,
    "random": RandomSampler,
    "cmaes": NumbersCmaEsSampler,
    "gp": GPSampler,
    "nsga2": BreedingNSGAIISampler,
    "nsga3": BreedingNSGAIIISampler,
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

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # one joint density for each method's own parameters, instead of none for all that methods don't share
    "tpe": {"multivariate": True, "group": True, "constant_liar": True},
    # without pruned ones a generation would never be whole where most of it is pruned
    "cmaes": {"warn_independent_sampling": False, "consider_pruned_trials": True},
    "gp": {"warn_independent_sampling": False},
    "qmc": {"warn_independent_sampling": False},
}
KINDS: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
}
"""Words of an annotation → types that a file's value may have."""
LEAST: Mapping[str, int] = {"n_startup_trials": 0, "inc_popsize": -1}
"""Smallest value of a count, where it is not 1."""
MOST = 1_000_000
"""Largest value of a count: there are as many candidates, or vectors in memory."""
_NOT_IN_A_FILE = ("Callable", "Sampler", "Mutation", "Crossover", "FrozenTrial", "ndarray")


def sampler_of_trials(
    name: str, seed: int, arguments: Mapping[str, Any] | None = None, selection: Selection | None = None
) -> Callable[[int], BaseSampler]:
    """Number of a trial → its sampler: ours are made anew for each, a foreign one lasts as long as the search.

    Raises:
        SettingsError: A foreign one cannot be had.
    """
    if is_foreign(name):
        sampler = make_foreign(name, seed, arguments)
        return lambda number: sampler
    return lambda number: make_sampler(name, seed, arguments, number, selection)


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
        name: One of `SAMPLERS`, or a foreign one, see `search.samplers.foreign`.
        seed: The campaign's.
        arguments: The sampler's arguments, as Optuna names them.
        number: The trial's.
        selection: The members' q and S, for `quality_diversity`, whose further arguments are `sampler` (the name of
            the one for all other parameters, `tpe` by default) and `sampler_arguments`.

    Raises:
        SettingsError: Unknown sampler or argument, or a value that the sampler refuses.
    """
    if is_foreign(name):
        return make_foreign(name, ask_seed(seed, number), arguments)
    if name not in SAMPLERS:
        raise SettingsError(f"unknown sampler '{name}'. {did_you_mean(name, list(SAMPLERS))}")
    known = _arguments(SAMPLERS[name])
    for argument in arguments or {}:
        if argument not in known:
            hint = did_you_mean(argument, known) if known else "It takes none."
            raise SettingsError(f"sampler '{name}' has no argument '{argument}'. {hint}")
        _require_kind(name, argument, (arguments or {})[argument])
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


def memories(
    name: str = "tpe", arguments: Mapping[str, Any] | None = None, limit: int | None = 500
) -> list[Memory] | None:
    """What a search's samplers need to see of its finished trials, so that proposals do not take longer with each.

    Models of all values see the best and the latest; evolution (`nsga2`, `nsga3`, `cmaes`) its last two generations, of
    whatever size; `qmc` a trial with each parameter.

    Args:
        name: One of `SAMPLERS`, or a foreign one, which sees all trials.
        arguments: The sampler's arguments.
        limit: How many trials models of all values see at most; more if the sampler is to start at random for as long.
            None for all.

    Returns:
        For `search.loop.search`; None where the sampler is to see all trials, or looks at none.
    """
    if is_foreign(name):
        return None
    given = {**DEFAULTS.get(name, {}), **(arguments or {})}
    if name == QUALITY_DIVERSITY:
        inner = memories(given.get("sampler", "tpe"), given.get("sampler_arguments"), limit)
        return None if limit is None else [Recent(limit), *(inner or ())]
    at_random = int(given.get("n_startup_trials", 0))
    if name in ("tpe", "gp"):
        return None if limit is None else [Recent(max(limit, 2 * at_random))]
    if name == "qmc":
        return [NewParameters()]
    if name == "cmaes":
        states = (TrialState.COMPLETE, TrialState.PRUNED)[: 1 + bool(given["consider_pruned_trials"])]
        return [Generations(_sampled, Recent(0), states, latest=max(at_random, 1))]
    if name in ("nsga2", "nsga3"):
        return [Generations(bred, Recent(2 * max(int(given.get("population_size", 0)), 250)))]
    return None


def _sampled(trial: FrozenTrial) -> Mark | None:
    """The generation of a trial that CMA-ES proposed, by any of its variants; it has no parents but a distribution."""
    generations = (trial.system_attrs.get(f"{variant}:generation") for variant in ("cma", "sepcma", "cmawm"))
    return next(((generation, ()) for generation in generations if generation is not None), None)


def _quality_diversity(seed: int, arguments: dict[str, Any], number: int, selection: Selection) -> BaseSampler:
    """The sampler on a selection's members; equal q, and members that differ, where it has neither q nor S."""
    names = selection.names
    inner, given = str(arguments.pop("sampler", "tpe")), arguments.pop("sampler_arguments", None)
    if given is not None and not isinstance(given, Mapping):
        raise SettingsError(
            f"sampler '{QUALITY_DIVERSITY}': sampler_arguments = {given!r} is no mapping of names to values"
        )
    if inner == QUALITY_DIVERSITY:
        raise SettingsError(f"sampler '{QUALITY_DIVERSITY}' needs another one for all but the subset, not itself")
    if is_foreign(inner):  # made anew for every trial it would forget, and be fetched, each time
        raise SettingsError(
            f"sampler '{QUALITY_DIVERSITY}' takes one of {', '.join(SAMPLERS)} beside it, not '{inner}'"
        )
    wrapped = make_sampler(inner, seed, given, number)
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


def _require_kind(name: str, argument: str, value: Any) -> None:
    """Looks whether a value is of the argument's type: most samplers find out when they propose, long after they were made.

    Raises:
        SettingsError: It is another, not finite, or a count out of bounds.
    """
    if argument not in inspect.signature(SAMPLERS[name]).parameters:
        return
    annotation = inspect.signature(SAMPLERS[name]).parameters[argument].annotation
    words = (annotation.__name__ if isinstance(annotation, type) else str(annotation)).split(" | ")
    if set(words) - KINDS.keys():
        return  # its own constructor looks at it
    kinds = [kind for word in words for kind in KINDS[word]]
    fits = type(value) in kinds and not (isinstance(value, float) and not math.isfinite(value))
    if fits and isinstance(value, int) and not isinstance(value, bool):
        fits = LEAST.get(argument, 1) <= value <= MOST
    if not fits:
        raise SettingsError(f"sampler '{name}': {argument} = {value!r} is not what Optuna takes ({' | '.join(words)})")


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
