"""Work for a group of evaluators: handed to whoever is free, and tried again where it is lost with one."""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray

from merging.errors import ClusterError
from ray_tasks.cluster_errors import reason
from ray_tasks.connect import alive_nodes
from ray_tasks.evaluators.evaluator import Answer, Assignment
from ray_tasks.evaluators.faults import FaultRecord
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from ray_tasks.evaluators.progress import EVERY, share_of
from ray_tasks.evaluators.prometheus import EvaluatorMetrics
from ray_tasks.sharded.shards import Receiver, Shards

GRACE = 20.0
"""Seconds that evaluators have to follow the first one, before work begins without them."""
REST = 5.0
"""Seconds that pass at most between two looks where there is nobody to wait for."""
DISPLACED = 10
"""How often an assignment may lose its node before it counts as lost: it may be what ends the nodes."""
AHEAD = 1
"""Assignments that wait at each of several evaluators, so that it goes on while the driver has its hands full."""


@dataclass
class _Work:
    """An assignment at an evaluator.

    Args:
        actor: The evaluator.
        node: Where that is.
        assignment: What it measures, or will.
        started: When it was handed out; once its clock runs, since when.
        deadline: When it has taken too long; inf until its clock runs: it waits for its turn, or for its weights.
        awaits: The delivery of its weights.
        turn: When its evaluator turned to it; None while it waits.
        recalled: Whether it was handed to another evaluator too: this one leaves it out when its turn comes.
    """

    actor: Any
    node: str
    assignment: Assignment
    started: datetime
    deadline: float = math.inf
    awaits: Any = None
    turn: float | None = None
    recalled: bool = False


@dataclass
class EvaluatorPool:
    """Evaluators that take assignments as they become free.

    A dead evaluator is replaced and its assignment reported as lost; if its whole node died, nobody is to blame, and the
    assignment goes to another evaluator without a word. One that exceeds the time limit is ended and replaced, its
    assignment reported as failed.

    An error that is about the machine (a device, memory, files, what is installed) has its evaluator replaced and the
    assignment tried on another one, if there is one that has answered before; what keeps failing elsewhere counts as
    failed, and a node whose failures go well elsewhere is avoided.

    Of several evaluators, and wherever shards merge, each has two assignments: the one that it measures, and one that
    waits for its turn, its weights merged and sent meanwhile. That one's clock does not run yet; if its evaluator is
    lost or ended, or another one has nothing to do, it goes elsewhere: at worst, if its turn comes at that very moment,
    it is measured twice, and counts once. A single evaluator has one assignment: what a search learns from it decides
    how the next is measured.

    Args:
        group: The evaluators.
        seconds: Wall time of one assignment; None for no limit.
        shards: Who merges, where evaluators do not; the group's `kind` has a `load(identity, *results)` then.
        metrics: Counts what they do.
    """

    group: EvaluatorGroup
    seconds: float | None = None
    shards: Shards | None = None
    metrics: EvaluatorMetrics | None = None
    _queues: dict[Any, deque[Any]] = field(default_factory=dict, init=False)
    _works: dict[Any, _Work] = field(default_factory=dict, init=False)
    _again: deque[Assignment] = field(default_factory=deque, init=False)
    _open: set[str] = field(default_factory=set, init=False)
    _displaced: Counter[str] = field(default_factory=Counter, init=False)
    _spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float), init=False)
    _killed: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    _receivers: dict[Any, Receiver] = field(default_factory=dict, init=False)
    _faults: FaultRecord = field(default_factory=FaultRecord, init=False)

    def start(self, timeout: float = 1800.0, grace: float = GRACE) -> int:
        """Starts the evaluators; returns when all are built, or those that are `grace` seconds after the first.

        Returns:
            How many are built.

        Raises:
            MergequestError: Building the first one failed: the evaluator's own error.
            ClusterError: They die, or the cluster has no room for a single one within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while self.there < self.group.evaluators and time.monotonic() < deadline:
            self.group.reconcile()
            pause = max(0.0, min(1.0, deadline - time.monotonic()))
            if not self.group.building:
                time.sleep(pause)
            for reference in _ready(list(self.group.building), pause):
                self._add(reference)
                if self.there:
                    deadline = min(deadline, time.monotonic() + grace)
        if not self.there:
            raise ClusterError(f"no evaluator could start within {timeout:.0f} s: the cluster has no room for one now")
        return self.there

    @property
    def capacity(self) -> int:
        """How many assignments the evaluators that are there take at once."""
        return self.there * self._depth

    @property
    def free(self) -> int:
        """How many assignments could be handed out now."""
        return sum(self._depth - min(self._depth, len(queue)) for queue in self._queues.values())

    @property
    def there(self) -> int:
        """How many evaluators are built."""
        return self.group.there

    @property
    def at_work(self) -> int:
        """How many of them have something to do."""
        return sum(bool(queue) for queue in list(self._queues.values()))

    def under_way(self) -> list[tuple[Assignment, float, float | None]]:
        """What evaluators are at work on, the longest first; may be asked from another thread.

        Returns:
            Assignments, for how many seconds, and the share that is done; None where it is not known.
        """
        now = time.monotonic()
        works = [(work, now - work.turn) for work in list(self._works.values()) if work.turn is not None]
        works.sort(key=lambda entry: -entry[1])
        return [
            (work.assignment, seconds, share_of(work.actor, work.assignment.ticket) if seconds > EVERY else None)
            for work, seconds in works
        ]

    def everywhere(self, probe: Callable[[], bool]) -> bool:
        """Whether something holds in the process of every evaluator that is there; False where one is lost meanwhile."""

        def ask(evaluator: Any) -> bool:
            return probe()

        try:
            return all(ray.get([actor.__ray_call__.remote(ask) for actor in self._queues]))
        except ray.exceptions.RayError:
            return False

    def submit(self, assignment: Assignment) -> None:
        """Hands an assignment to the evaluator that has least to do.

        Raises:
            ClusterError: All have as much as they take.
        """
        if (actor := self._free_actor()) is None:
            raise ClusterError("every evaluator is busy")
        self._hand(assignment, actor)

    def _free_actor(self, after: Sequence[str] | None = None) -> Any:
        """The evaluator that has least to do; None where all have as much as they take.

        Args:
            after: Nodes where the assignment met an error of the machine: evaluators that have answered before are asked,
                where there are any, those of other nodes first.
        """
        there = self._queues.keys() & self._faults.sound if after is not None else set()
        order = [actor for actor in self._queues if not there or actor in there]
        free = [actor for actor in order if len(self._queues[actor]) < self._depth]
        return min(
            free, key=lambda actor: (self.group.node(actor) in (after or ()), len(self._queues[actor])), default=None
        )

    def _hand(self, assignment: Assignment, actor: Any) -> None:
        work = _Work(actor, self.group.node(actor), assignment, datetime.now(UTC))
        if self.shards is not None:
            results = self.shards.merge(assignment.recipe, self._receivers.get(actor))
            work.awaits = actor.load.remote(assignment.recipe.identity, *results)
        reference = actor.measure.remote(assignment)
        self._works[reference] = work
        self._open.add(assignment.ticket)
        self._queues[actor].append(reference)
        self._start_clock(actor)

    def wait(self, timeout: float) -> list[Answer]:
        """Assignments that finished within `timeout` seconds; returns at the first, or when an evaluator has joined.

        Raises:
            ClusterError: Evaluators die as fast as they are replaced, and none is left.
        """
        self.group.reconcile()
        self._recall()
        self._look()
        finished = []
        if not self.there and not self.group.building:
            time.sleep(min(timeout, REST))
        for reference in _ready([*self._works, *self.group.building], timeout):
            if reference in self.group.building:
                self._add(reference)
            elif reference in self._works:  # not withdrawn meanwhile, with an evaluator that was lost
                finished += self._collect(reference)
        for actor in list(self._queues):
            finished += self._watch_clock(actor)
        for assignment in [self._again.popleft() for _ in range(len(self._again))]:
            if assignment.ticket not in self._open:
                continue
            actor = self._free_actor(self._faults.nodes(assignment.ticket))
            if actor is None:
                self._again.append(assignment)
            else:
                self._hand(assignment, actor)
        self._look()
        for done in finished:
            if self.metrics and not done.lost:
                self.metrics.answered(done.measurement)
        return finished

    def close(self) -> None:
        """Ends the evaluators."""
        self.group.close()
        for held in (self._queues, self._works, self._again, self._open, self._spent, self._receivers, self._faults):
            held.clear()
        self._look()

    @property
    def _depth(self) -> int:
        """How many assignments each evaluator has at most."""
        return 1 + (AHEAD if self.group.evaluators > 1 or self.shards is not None else 0)

    def _look(self) -> None:
        if self.metrics:
            self.metrics.look(self.there, self.at_work)

    def _add(self, reference: Any) -> None:
        if (actor := self.group.add(reference)) is not None:
            self._queues[actor] = deque()
            if self.shards is not None and self.shards.parts:
                self._receivers[actor] = Receiver(actor.address.remote())

    def _start_clock(self, actor: Any) -> None:
        """Starts the clock of the assignment whose turn it is, if it has what it waits for."""
        work = self._works[self._queues[actor][0]] if self._queues[actor] else None
        if work is not None and work.turn is None:
            work.turn = time.monotonic()
        if work is None or self.seconds is None or work.deadline < math.inf:
            return
        if work.awaits is None or ray.wait([work.awaits], timeout=0)[0]:
            work.started, work.deadline = datetime.now(UTC), time.monotonic() + self.seconds

    def _watch_clock(self, actor: Any) -> list[Answer]:
        """Ends an evaluator that takes too long; that it died is no reason to give up its place."""
        work = self._works[self._queues[actor][0]] if self._queues[actor] else None
        if work is None or time.monotonic() < work.deadline:
            self._start_clock(actor)
            return []
        self._remove(actor, but=work)
        self._count_seconds(work)
        error = f"TimeoutError: not measured within {self.seconds:g} s (search.candidate_seconds)"
        return self._finished(work, Answer(None, error, "", work.started))

    def _recall(self) -> None:
        """Hands what waits at one evaluator to another that has nothing to do."""
        if self.shards is not None:  # its weights are on their way
            return
        idle = sum(not queue for queue in self._queues.values())
        waiting = [self._works[queue[-1]] for queue in self._queues.values() if len(queue) > 1]
        for work in [work for work in waiting if not work.recalled][:idle]:
            work.recalled = True
            ray.cancel(self._queues[work.actor][-1])
            self.submit(work.assignment)

    def _collect(self, reference: Any) -> list[Answer]:
        """What came of an assignment, if it was its turn."""
        work = self._works[reference]
        queue, ticket = self._queues[work.actor], work.assignment.ticket
        if queue[0] != reference:
            return []  # what was before it is not heard of yet: that is told what went wrong
        if work.awaits is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(work.awaits)  # the answer says what became of it
        answer: Answer | None = None
        try:
            answer = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            pass
        except ray.exceptions.RayError as error:
            return self._lose(work, error)
        queue.popleft()
        del self._works[reference]
        self._start_clock(work.actor)
        if answer is None:
            return []
        self._spent[ticket] += answer.seconds
        if answer.unreachable:
            self._remove(work.actor)
            self.group.count_death(str(answer.error))
        elif answer.fault:
            return self._fault(work, answer)
        else:
            self.group.count_answer()
            self._killed.pop(work.assignment.candidate, None)
            for node in self._faults.answered(ticket, work.actor):
                self.group.blame(node, self._faults.last_error)
        self._displaced.pop(ticket, None)
        if answer.lost and self.shards is not None:
            self.shards.forget()
        return self._finished(work, answer)

    def _fault(self, work: _Work, answer: Answer) -> list[Answer]:
        """Replaces an evaluator that met an error of its machine; another one tries the assignment.

        Raises:
            ClusterError: Candidate after candidate fails like that.
        """
        ticket = work.assignment.ticket
        self._remove(work.actor)
        if ticket not in self._open:
            return []
        if not self._faults.add(ticket, work.node, answer.error or ""):
            if self.metrics:
                self.metrics.lost()
            self._again.append(work.assignment)
            return []
        return self._finished(work, answer)

    def _lose(self, work: _Work, error: ray.exceptions.RayError) -> list[Answer]:
        """Replaces an evaluator that is gone."""
        why = f"{type(error).__name__}: {reason(error)}"
        ticket = work.assignment.ticket
        displaced = getattr(error, "preempted", False) or work.node not in {node["NodeID"] for node in alive_nodes()}
        unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        self._remove(work.actor, but=work)
        self._count_seconds(work)
        if self.metrics:
            self.metrics.lost()
        if displaced:
            idle = [actor for actor, queue in self._queues.items() if not queue]
            for actor in [actor for actor in idle if self.group.node(actor) == work.node]:
                self._remove(actor)
        if displaced and self._displaced[ticket] < DISPLACED:
            self.group.count_lost_node()
            self._displaced[ticket] += 1
            self._again.append(work.assignment)
            return []
        if not displaced and not unreachable:
            self._killed[work.assignment.candidate] += 1
            if self._killed[work.assignment.candidate] == 1:  # the same one again tells of the candidate alone
                self.group.count_death(why)
        self._displaced.pop(ticket, None)
        return self._finished(work, Answer(None, why, "", work.started, lost=True))

    def _remove(self, actor: Any, but: _Work | None = None) -> None:
        """Ends an evaluator, if it is not dead, and has it replaced at once; what waited there goes elsewhere."""
        self.group.remove(actor)
        self._receivers.pop(actor, None)
        self._faults.forget_evaluator(actor)
        works = [self._works.pop(reference) for reference in self._queues.pop(actor)]
        self._again.extend(work.assignment for work in works if work is not but and not work.recalled)

    def _count_seconds(self, work: _Work) -> None:
        """Counts what an evaluator that is gone spent on the assignment whose turn it was."""
        self._spent[work.assignment.ticket] += max(0.0, (datetime.now(UTC) - work.started).total_seconds())

    def _finished(self, work: _Work, answer: Answer) -> list[Answer]:
        """What came of an assignment; nothing where it was recalled too late, and had come back already."""
        ticket = answer.ticket = work.assignment.ticket
        answer.seconds = self._spent.pop(ticket, 0.0)
        if ticket not in self._open:
            return []
        self._open.remove(ticket)
        self._faults.forget_assignment(ticket)
        return [answer]


def _ready(references: list[Any], timeout: float) -> list[Any]:
    """What is done, waiting up to `timeout` seconds for the first."""
    if not references:
        return []
    ready, _ = ray.wait(references, num_returns=1, timeout=timeout)
    if ready:  # whatever else is done already comes along
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    return list(ready)
