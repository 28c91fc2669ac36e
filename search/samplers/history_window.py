"""What a sampler needs to see of a history: never all of it, so that a proposal costs the same after ten thousand trials."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from optuna.trial import FrozenTrial, TrialState

Mark = tuple[int, Sequence[int]]
"""A trial's generation, and the numbers of the trials that it was bred from."""


class Memory(Protocol):
    """Some of the finished trials that it was told of."""

    def add(self, trial: FrozenTrial) -> None:
        """Takes in a trial that is complete or pruned."""
        ...

    def trials(self) -> list[FrozenTrial]:
        """Those that it still knows."""
        ...


class Recent:
    """The best quarter of so many finished trials, and the latest: what models of all values need.

    TPE's better group is of 25 trials at most, so that this tells it nearly the same as everything.

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
        violation = sum(max(0.0, value) for value in trial.constraints.values())
        entry = (-violation, sum(trial.values), -trial.number, trial)
        if len(self._best) < self._share:
            heapq.heappush(self._best, entry)
        else:
            heapq.heappushpop(self._best, entry)

    def trials(self) -> list[FrozenTrial]:
        """See `Memory`."""
        by_number = {trial.number: trial for trial in (*self._latest, *(entry[-1] for entry in self._best))}
        return [by_number[number] for number in sorted(by_number)]


class Generations:
    """The last two generations and their parents: what evolution needs, however long ago a parent was measured.

    Trials of no generation (proposed by another sampler, or of a study that was rebuilt from its ledger) are known until
    the third generation.

    Args:
        mark: A trial's mark; None where it has none.
        unmarked: Which trials without a mark are known.
        states: Which trials count; of others there may be any number in a generation.
        latest: How many of the latest are known besides.
    """

    def __init__(
        self,
        mark: Callable[[FrozenTrial], Mark | None],
        unmarked: Memory,
        states: Sequence[TrialState] = (TrialState.COMPLETE,),
        latest: int = 0,
    ) -> None:
        self._mark, self._unmarked, self._states = mark, unmarked, states
        self._latest: deque[FrozenTrial] = deque(maxlen=latest)
        self._generations: dict[int, list[FrozenTrial]] = {}
        self._parents: list[FrozenTrial] = []

    def add(self, trial: FrozenTrial) -> None:
        """Takes in a trial; the first of a new generation ends what is known of those before the last."""
        if trial.state not in self._states:
            return
        self._latest.append(trial)
        mark = self._mark(trial)
        if mark is None:
            self._unmarked.add(trial)
            return
        generation, parents = mark
        newest = max(self._generations, default=-1)
        if generation > newest:
            before = self._generations.get(newest, [])
            wanted = {*parents, *((self._mark(before[0]) or mark)[1] if before else ())}
            self._parents = [known for known in self.trials() if known.number in wanted]
            self._generations = {generation: [trial]} | ({newest: before} if before else {})
        elif generation in self._generations:
            self._generations[generation].append(trial)

    def trials(self) -> list[FrozenTrial]:
        """See `Memory`."""
        first = self._unmarked.trials() if max(self._generations, default=0) <= 1 else []
        known = [*first, *self._latest, *self._parents, *(t for own in self._generations.values() for t in own)]
        return list({trial.number: trial for trial in known}.values())


class NewParameters:
    """Trials that had a parameter that none before them had: what a union of all search spaces needs."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._trials: list[FrozenTrial] = []

    def add(self, trial: FrozenTrial) -> None:
        """Takes in a trial that brings something new."""
        if not self._names.issuperset(trial.distributions):
            self._names.update(trial.distributions)
            self._trials.append(trial)

    def trials(self) -> list[FrozenTrial]:
        """See `Memory`."""
        return self._trials
