"""The driver's hold of a study: asking costs the same after ten thousand trials as after ten."""

from collections import deque
from collections.abc import Container, Sequence
from copy import copy
from copy import deepcopy as copied
from typing import Any

from optuna import Study, Trial
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from search.samplers.history_window import Memory
from search.study import lasting

LEARNT_FROM = (TrialState.COMPLETE, TrialState.PRUNED)


class WindowedStudy(Study):
    """A study as its one driver asks it: waiting trials first, and a bounded history for the sampler.

    Optuna's samplers read every finished trial for every parameter that they propose: TPE takes seconds for a
    proposal after ten thousand trials.

    A driver asks ahead: what it proposes next knows nothing of the candidates in flight. So that a resumed search proposes what
    an unbroken one would have, the last rows are held back as running trials until as many candidates are in flight again.

    Args:
        study: With no trial running.
        memories: Between them, they know the finished trials that samplers see; None for all.
        held: Numbers of finished trials that are held back at first, the earliest first.
    """

    def __init__(self, study: Study, memories: Sequence[Memory] | None = None, held: Sequence[int] = ()) -> None:
        super().__init__(study.study_name, study._storage, RandomSampler(0))
        trials = study.get_trials(deepcopy=False)
        self._count = len(trials)
        self._waiting = deque(trial for trial in trials if trial.state == TrialState.WAITING)
        self._held = deque(trials[number] for number in held if number < len(trials))
        self._running: dict[int, FrozenTrial] = {trial.number: _as_running(trial) for trial in self._held}
        self._memories = memories
        self._seen: dict[tuple[TrialState, ...] | None, list[FrozenTrial]] = {}
        for trial in trials:
            if trial.number not in self._running:
                self._learn(trial)

    @property
    def has_waiting(self) -> bool:
        """Whether the trial that is asked next is there already, its parameters given."""
        return bool(self._waiting)

    @property
    def next_number(self) -> int:
        """The number of the trial that is asked next."""
        return self._waiting[0].number if self._waiting else self._count

    def enqueue(self, params: dict[str, Any], user_attrs: dict[str, Any]) -> None:
        """Has a trial wait whose parameters are given: it is asked before the sampler proposes anything."""
        self.enqueue_trial(params, user_attrs)
        self._waiting.append(self._storage.get_all_trials(self._study_id, deepcopy=False)[-1])
        self._count = max(self._count, self._waiting[-1].number + 1)

    def hold(self, most: int) -> bool:
        """Holds back so many finished trials at most; samplers learn from the others. Whether it let go of any."""
        held = len(self._held)
        while len(self._held) > most:
            trial = self._held.popleft()
            self._running.pop(trial.number)
            self._seen.clear()
            self._learn(trial)
        return len(self._held) < held

    def holds_back(self, number: int | None) -> bool:
        """Whether the trial of this number is finished and held back."""
        return any(trial.number == number for trial in self._held)

    def under_way(self, trial: Trial) -> None:
        """Lets samplers know of a trial whose parameters are complete."""
        self._running[trial.number] = _as_running(self._storage.get_trial(trial._trial_id))
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
        if trial.state in LEARNT_FROM:
            for memory in self._memories or ():
                memory.add(trial)

    def _pop_waiting_trial_id(self) -> int | None:
        if not self._waiting:
            return None
        number = self._waiting.popleft()._trial_id
        self._storage.set_trial_state_values(number, state=TrialState.RUNNING)
        return number

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if self._memories is None:
            every = (self._running.get(trial.number, trial) for trial in super()._get_trials(False, None, use_cache))
            trials = [trial for trial in every if states is None or trial.state in states]
            return copied(trials) if deepcopy else trials
        wanted = None if states is None else tuple(state for state in TrialState if state in states)
        if wanted not in self._seen:  # samplers ask for every group of parameters
            known = {trial.number: trial for memory in self._memories for trial in memory.trials()}
            seen = [*(known[number] for number in sorted(known)), *(self._running[n] for n in sorted(self._running))]
            self._seen[wanted] = [trial for trial in seen if wanted is None or trial.state in wanted]
        return copied(self._seen[wanted]) if deepcopy else list(self._seen[wanted])


def _as_running(trial: FrozenTrial) -> FrozenTrial:
    """A trial as samplers see it while it is being evaluated, of which they know no more than its parameters and their notes.

    TPE's own notes of a running trial have the parameters of other subsets, too, which say nothing of it.
    """
    running = copy(trial)
    running.state, running.values, running.datetime_complete = TrialState.RUNNING, None, None
    running.intermediate_values = {}
    running.system_attrs = lasting(trial.system_attrs)
    return running
