"""Optuna's samplers, adapted to spaces of many methods, to studies that are resumed, and to histories without end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import CmaEsSampler, NSGAIIISampler, NSGAIISampler, QMCSampler, TPESampler
from optuna.samplers._ga import BaseGASampler
from optuna.trial import FrozenTrial, TrialState

from search.samplers.history_window import Mark

BRED = "bred"
"""System attribute of a trial that evolution proposed: its generation, and the numbers of that generation's parents."""

DISTRIBUTION = "cma:distribution"
"""System attribute of the first trials of a generation of CMA-ES: the distribution that they were drawn from."""
_DERIVED = ("_rng", "_B", "_D", "_funhist_values")
"""Attributes of a CMA-ES distribution that are not noted: seeded anew for each draw, or derived."""


def _union(trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """All parameters that any of the trials has, those that are fixed left out."""
    every = {name: entry for trial in trials for name, entry in trial.distributions.items()}
    return {name: every[name] for name in sorted(every) if not every[name].single()}


class UnionQMCSampler(QMCSampler):
    """Optuna's quasi-Monte Carlo over every parameter seen so far, in the sequence at the trial's number.

    Optuna's own takes the first trial's parameters, which are a few of many in a conditional space, and
    counts places in the study, where a killed trial would leave a hole.
    """

    _position = 0

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of all earlier trials."""
        return _union(past for past in study.get_trials(deepcopy=False) if past.number < trial.number)

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
        by_kind: dict[frozenset[str], FrozenTrial] = {}
        for trial in self._study._get_trials(*arguments, **named):
            by_kind.setdefault(frozenset(trial.distributions), trial)
        return list(by_kind.values())


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
        sampled = super().sample_relative(study, trial, shared)
        prefix = f"{sampled['method']}." if "method" in sampled else ""
        own = {n: entry for n, entry in search_space.items() if n not in shared and n.startswith(prefix)}
        return sampled | super().sample_relative(study, trial, own)


class NumbersCmaEsSampler(CmaEsSampler):
    """Optuna's CMA-ES, whose distribution is kept with a trial as numbers by name, not as a pickle.

    A ledger is a file that people share: nothing that it holds may be executed.
    """

    _state: Mapping[str, Any] | None = None
    _optimizer: Any = None
    _fresh: Mapping[str, Any] = MappingProxyType({})

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's; a distribution that has just learnt from a generation is noted."""
        self._optimizer = None
        drawn = super().sample_relative(study, trial, search_space)
        if self._optimizer is not None and (now := _numbers(self._optimizer)) != self._fresh:
            learnt = {name: value for name, value in now.items() if value != self._fresh.get(name)}
            if learnt != self._state:
                study._storage.set_trial_system_attr(trial._trial_id, DISTRIBUTION, learnt)
        return drawn

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        noted = (trial.system_attrs.get(DISTRIBUTION) for trial in reversed(completed_trials))
        self._state = next((state for state in noted if isinstance(state, dict)), None)

    def _init_optimizer(self, *arguments: Any) -> Any:
        self._optimizer = super()._init_optimizer(*arguments)
        self._fresh = _numbers(self._optimizer)
        if self._state is not None and _fits(self._state, self._fresh):
            _take_numbers(self._optimizer, self._state)
        return self._optimizer

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        return {}  # noted as numbers


def _numbers(optimizer: Any) -> dict[str, Any]:
    """A CMA-ES distribution's attributes that are numbers, without what follows from them; those of one within it, too."""
    numbers: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if name in _DERIVED:
            continue
        if isinstance(value, np.ndarray):
            numbers[name] = value.tolist()
        elif isinstance(value, int | float):
            numbers[name] = value
        elif hasattr(value, "generation"):
            numbers[name] = _numbers(value)
    return numbers


def _fits(state: Mapping[str, Any], fresh: Mapping[str, Any]) -> bool:
    """Whether numbers could be those of such a distribution."""
    for name, value in state.items():
        mine = fresh.get(name)
        if isinstance(value, Mapping):
            if not isinstance(mine, Mapping) or not _fits(value, mine):
                return False
            continue
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            return False
        if mine is None or isinstance(mine, Mapping) or array.shape != np.shape(mine) or not np.isfinite(array).all():
            return False
    return True


def _take_numbers(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Gives a fresh distribution what another has learnt."""
    for name, value in state.items():
        mine = getattr(optimizer, name)
        if isinstance(value, Mapping):
            _take_numbers(mine, value)
        else:
            setattr(optimizer, name, np.array(value, mine.dtype) if isinstance(mine, np.ndarray) else type(mine)(value))


def bred(trial: FrozenTrial) -> Mark | None:
    """The generation and the parents of a trial that evolution proposed; None of any other."""
    mark = trial.system_attrs.get(BRED)
    if (
        not isinstance(mark, list) or len(mark) != 2 or not isinstance(mark[1], list)
    ):  # a ledger's note, or what became of it
        return None
    numbers = [mark[0], *mark[1]]
    return (mark[0], mark[1]) if all(type(number) is int and number >= 0 for number in numbers) else None


class _Breeding(BaseGASampler):
    """Evolution whose generations and parents are written on the trials that they led to, and which breeds like with like.

    Optuna's own keeps the parents with the study, under numbers that change when it is rewritten, and looks for
    generations in all trials; here the last two and their parents suffice (`history_window.Generations`), a killed search
    goes on as an unbroken one, and trials of no generation, of a study rebuilt from its ledger, are the first. Optuna's
    own breeds only parameters that all trials have, of many methods none but the method: here parents are of one method
    and subset where two are.
    """

    _child_generation_strategy: Any
    _rng: Any

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the trials that it sees."""
        return _union(_complete(study))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A child of parents that are alike; nothing in the first generation."""
        if bred(trial) is not None:
            return {}  # proposed before, and given its parameters again
        generation = self._next_generation(study)
        parents = self.get_parent_population(study, generation)
        study._storage.set_trial_system_attr(trial._trial_id, BRED, [generation, [own.number for own in parents]])
        if not parents:
            return {}
        alike = _alike(parents, parents[self._rng.rng.choice(len(parents))])
        common = {name: entry for name, entry in search_space.items() if all(name in own.params for own in alike)}
        return dict(self._child_generation_strategy(study, common, alike)) if common else {}

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The complete trials of a generation."""
        return [trial for trial in _complete(study) if (bred(trial) or (0,))[0] == generation]

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Those that a generation is bred from, as a trial of it says; none of the first generation."""
        if generation == 0:
            return []
        trials = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        marks = (bred(trial) for trial in trials)
        chosen = next((set(mark[1]) for mark in marks if mark is not None and mark[0] == generation), None)
        if chosen is None:
            return self.select_parent(study, generation)
        return [trial for trial in trials if trial.number in chosen]

    def _next_generation(self, study: Study) -> int:
        """The newest generation, or the one after it if that is complete."""
        generations = [(bred(trial) or (0,))[0] for trial in _complete(study)]
        newest = max(generations, default=0)
        return newest + (generations.count(newest) >= (self.population_size or 0))


def _complete(study: Study) -> list[FrozenTrial]:
    return study._get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _alike(parents: Sequence[FrozenTrial], one: FrozenTrial) -> list[FrozenTrial]:
    """The parents with the parameters of this one, or its method if there is no other, or all."""
    kinds: tuple[Callable[[FrozenTrial], object], ...] = (
        lambda own: own.distributions.keys(),
        lambda own: own.params.get("method"),
    )
    for kind in kinds:
        alike = [own for own in parents if kind(own) == kind(one)]
        if len(alike) > 1:
            return alike
    return list(parents)


class BreedingNSGAIISampler(_Breeding, NSGAIISampler):
    """Optuna's NSGA-II, as `_Breeding` has it."""


class BreedingNSGAIIISampler(_Breeding, NSGAIIISampler):
    """Optuna's NSGA-III, as `_Breeding` has it."""
