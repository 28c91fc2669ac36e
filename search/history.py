"""The driver's hold of a study: asking costs the same after ten thousand trials as after ten."""

import heapq
from collections import deque
from collections.abc import Container
from copy import deepcopy as copied
from typing import Any

from optuna import Study, Trial
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

LEARNT_FROM = (TrialState.COMPLETE, TrialState.PRUNED)


class Asking(Study):
    """A study as its one driver asks it: waiting trials first, and a bounded history for the sampler.

    Optuna's samplers read every finished trial for every parameter that they propose: TPE takes seconds for a
    proposal after ten thousand trials. TPE's better group is of 25 trials at most, so a history of the best and
    the latest tells it nearly the same.

    Args:
        study: With no trial running.
        limit: How many finished trials samplers see at most, see `Recent`; None for all.
    """

    def __init__(self, study: Study, limit: int | None = None) -> None:
        super().__init__(study.study_name, study._storage, RandomSampler(0))
        trials = study.get_trials(deepcopy=False)
        self._count = len(trials)
        self._waiting = deque(trial for trial in trials if trial.state == TrialState.WAITING)
        self._running: dict[int, FrozenTrial] = {}
        self._recent = None if limit is None else Recent(limit)
        self._seen: dict[tuple[TrialState, ...] | None, list[FrozenTrial]] = {}
        for trial in trials:
            self._learn(trial)

    @property
    def has_waiting(self) -> bool:
        """Whether the trial that is asked next is there already, its parameters given."""
        return bool(self._waiting)

    @property
    def next_number(self) -> int:
        """The number of the trial that is asked next."""
        return self._waiting[0].number if self._waiting else self._count

    def under_way(self, trial: Trial) -> None:
        """Lets samplers know of a trial whose parameters are complete."""
        self._running[trial.number] = self._storage.get_trial(trial._trial_id)
        self._seen.clear()

    def finished(self, trial: Trial) -> None:
        """Lets samplers learn from a trial that has been told."""
        self._running.pop(trial.number, None)
        self._seen.clear()
        self._learn(self._storage.get_trial(trial._trial_id))

    def ask(self, fixed_distributions: Any = None) -> Trial:
        """The next trial, as `Study.ask`; samplers know of it once it is `under_way`."""
        trial = super().ask(fixed_distributions)
        self._count = max(self._count, trial.number + 1)
        return trial

    def _learn(self, trial: FrozenTrial) -> None:
        if self._recent is not None and trial.state in LEARNT_FROM:
            self._recent.add(trial)

    def _pop_waiting_trial_id(self) -> int | None:
        if not self._waiting:
            return None
        number = self._waiting.popleft()._trial_id
        self._storage.set_trial_state_values(number, state=TrialState.RUNNING)
        return number

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self._recent is None:
            return super()._get_trials(deepcopy, states, use_cache)
        wanted = None if states is None else tuple(state for state in TrialState if state in states)
        if wanted not in self._seen:  # samplers ask for every group of parameters
            seen = [*self._recent.trials(), *(self._running[number] for number in sorted(self._running))]
            self._seen[wanted] = [trial for trial in seen if wanted is None or trial.state in wanted]
        return copied(self._seen[wanted]) if deepcopy else list(self._seen[wanted])


class Recent:
    """The best quarter of so many finished trials, and the latest.

    Args:
        limit: How many at most; the best may be among the latest. Of several objectives, a trial is as good as the
            sum of its values.
    """

    def __init__(self, limit: int) -> None:
        self._best: list[tuple[float, float, int, FrozenTrial]] = []
        self._share = limit // 4
        self._latest: deque[FrozenTrial] = deque(maxlen=limit - self._share)

    def add(self, trial: FrozenTrial) -> None:
        """Takes in a trial; what is neither among the best nor among the latest any more is forgotten."""
        self._latest.append(trial)
        if trial.state != TrialState.COMPLETE or not self._share:
            return
        breach = sum(max(0.0, value) for value in trial.constraints.values())
        entry = (-breach, sum(trial.values), -trial.number, trial)
        if len(self._best) < self._share:
            heapq.heappush(self._best, entry)
        else:
            heapq.heappushpop(self._best, entry)

    def trials(self) -> list[FrozenTrial]:
        """The trials, by number."""
        found = {trial.number: trial for trial in (*self._latest, *(entry[-1] for entry in self._best))}
        return [found[number] for number in sorted(found)]
