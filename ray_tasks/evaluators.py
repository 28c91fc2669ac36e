"""A pool of evaluators that come and go: work is handed to whoever is free, and what is lost with one is tried again."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray

from merging.errors import ClusterError
from merging.live import Measurement
from ray_tasks.evaluation import Answer, Assignment, Evaluator
from ray_tasks.failures import reason, surfaced
from ray_tasks.metrics import EvaluatorMetrics
from ray_tasks.shards import Shards

GRACE = 20.0
"""Seconds that evaluators have to follow the first one, before work begins without them."""
LOOK = 5.0
"""Seconds between two looks at how many evaluators there are and could be."""
SILENCE = 30.0
"""Seconds without any evaluator after which that is said, and again after four times as long."""
DISPLACED = 10
"""How often an assignment may lose its node before it counts as lost: it may be what ends the nodes."""
AHEAD = 1
"""Assignments that wait at each of several evaluators, so that it goes on while the driver has its hands full."""


@dataclass(frozen=True)
class Finished:
    """What came of an assignment.

    Args:
        ticket: The caller's name for it.
        started: When work on it began, or when it was handed out if its worker died.
        measurement: The scores; None if it failed.
        error: Type and message of the failure.
        lost: Whether its worker died, so that trying again may help.
        worker: Who did it.
    """

    ticket: str
    started: datetime
    measurement: Measurement | None = None
    error: str | None = None
    lost: bool = False
    worker: str | None = None


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
        recalled: Whether it was handed to another evaluator too: this one leaves it out when its turn comes.
    """

    actor: Any
    node: str
    assignment: Assignment
    started: datetime
    deadline: float = math.inf
    awaits: Any = None
    recalled: bool = False


@dataclass
class EvaluatorPool:
    """Evaluators that take assignments as they become free.

    They count from when they are built: where the cluster has no room for one, it joins when there is room, and until then
    nothing waits for it. A dead one is replaced and its assignment reported as lost; if its whole node died, nobody is to
    blame, and the assignment goes to another evaluator without a word. One that exceeds the time limit is ended and
    replaced, its assignment reported as failed.

    Of several evaluators, and wherever shards merge, each has two assignments: the one that it measures, and one that
    waits for its turn, its weights merged and sent meanwhile. That one's clock does not run yet; if its evaluator is
    lost or ended, or another one has nothing to do, it goes elsewhere: at worst, if its turn comes at that very moment,
    it is measured twice, and counts once. A single evaluator has one assignment: what a search learns from it decides
    how the next is measured.

    Args:
        setup: What each evaluator builds.
        evaluators: How many to have, whether or not there is room for all of them now.
        threads: CPUs and torch threads of each.
        gpus: GPUs of each.
        restarts: How often each may die before any of them answers, until dead ones are no longer replaced.
        seconds: Wall time of one assignment; None for no limit.
        room: Says how many the cluster would hold by now, where their number shall grow with it.
        say: Told, in a line for users, when there is no evaluator left to wait for, or more of them.
        kind: The class of the actors: made of `setup` and `threads`, with `build()` and `measure(assignment)`.
        shards: Who merges, where evaluators do not; `kind` has a `load(identity, *pieces)` then.
        metrics: Counts what they do.
        memory: Bytes that each asks its node for; 0 for none.
    """

    setup: Any
    evaluators: int
    threads: int = 1
    gpus: float = 0.0
    restarts: int = 3
    seconds: float | None = None
    room: Callable[[], int] | None = None
    say: Callable[[str], None] = lambda text: None
    kind: type[Any] = Evaluator
    shards: Shards | None = None
    metrics: EvaluatorMetrics | None = None
    memory: int = 0
    _building: dict[Any, Any] = field(default_factory=dict, init=False)
    _queues: dict[Any, deque[Any]] = field(default_factory=dict, init=False)
    _works: dict[Any, _Work] = field(default_factory=dict, init=False)
    _nodes: dict[Any, str] = field(default_factory=dict, init=False)
    _again: deque[Assignment] = field(default_factory=deque, init=False)
    _open: set[str] = field(default_factory=set, init=False)
    _displaced: Counter[str] = field(default_factory=Counter, init=False)
    _ever: bool = field(default=False, init=False)
    _deaths: int = field(default=0, init=False)
    _last: str = field(default="", init=False)
    _looked: float = field(default=-math.inf, init=False)
    _spoke: float = field(default=math.inf, init=False)

    def start(self, timeout: float = 1800.0, grace: float = GRACE) -> int:
        """Starts the evaluators; returns when all are built, or those that are `grace` seconds after the first.

        Returns:
            How many are built.

        Raises:
            MergequestError: Building the first one failed: the evaluator's own error.
            ClusterError: They die, or the cluster has no room for a single one within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        self._spoke = time.monotonic()
        while len(self._nodes) < self.evaluators and time.monotonic() < deadline:
            self._tend()
            pause = max(0.0, min(1.0, deadline - time.monotonic()))
            for reference in _ready(list(self._building), pause):
                self._welcome(reference)
                if self._nodes:
                    deadline = min(deadline, time.monotonic() + grace)
        if not self.capacity:
            raise ClusterError(f"no evaluator could start within {timeout:.0f} s: the cluster has no room for one now")
        return len(self._nodes)

    @property
    def capacity(self) -> int:
        """How many assignments the evaluators that are there take at once."""
        return len(self._nodes) * self._depth

    @property
    def free(self) -> int:
        """How many assignments could be handed out now."""
        return sum(self._depth - min(self._depth, len(queue)) for queue in self._queues.values())

    @property
    def there(self) -> int:
        """How many evaluators are built."""
        return len(self._nodes)

    @property
    def at_work(self) -> int:
        """How many of them have something to do."""
        return sum(bool(queue) for queue in list(self._queues.values()))

    def submit(self, assignment: Assignment) -> None:
        """Hands an assignment to the evaluator that has least to do.

        Raises:
            ClusterError: All have as much as they take.
        """
        actor = min(self._queues, key=lambda actor: len(self._queues[actor]), default=None)
        if actor is None or len(self._queues[actor]) >= self._depth:
            raise ClusterError("every evaluator is busy")
        work = _Work(actor, self._nodes[actor], assignment, datetime.now(UTC))
        if self.shards is not None:
            work.awaits = actor.load.remote(assignment.recipe.identity, *self.shards.merge(assignment.recipe))
        reference = actor.measure.remote(assignment)
        self._works[reference] = work
        self._open.add(assignment.ticket)
        self._queues[actor].append(reference)
        self._start_clock(actor)

    def wait(self, timeout: float) -> list[Finished]:
        """Assignments that finished within `timeout` seconds; returns at the first, or when an evaluator has joined.

        Raises:
            ClusterError: Evaluators die as fast as they are replaced, and none is left.
        """
        self._tend()
        self._recall()
        self._look()
        finished = []
        if not self.capacity and not self._building:
            time.sleep(min(timeout, LOOK))
        for reference in _ready([*self._works, *self._building], timeout):
            if reference in self._building:
                self._welcome(reference)
            elif reference in self._works:  # not withdrawn meanwhile, with an evaluator that was lost
                finished += self._collect(reference)
        for actor in list(self._queues):
            finished += self._watch_clock(actor)
        while self._again and self.free:
            if (assignment := self._again.popleft()).ticket in self._open:
                self.submit(assignment)
        self._look()
        for done in finished:
            if self.metrics and not done.lost:
                self.metrics.answered(done.measurement)
        return finished

    def close(self) -> None:
        """Ends the evaluators."""
        for actor in [*self._queues, *self._building.values()]:
            ray.kill(actor)
        for held in (self._queues, self._works, self._building, self._nodes, self._again, self._open):
            held.clear()
        self._look()

    @property
    def _depth(self) -> int:
        """How many assignments each evaluator has at most."""
        return 1 + (AHEAD if self.evaluators > 1 or self.shards is not None else 0)

    def _tend(self) -> None:
        """Now and then: replaces who died, grows with the cluster, and says so when nobody is there."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        if self.room is not None and (room := self.room()) > self.evaluators:
            self.say(f"the cluster grew: {room} evaluators instead of {self.evaluators}")
            self.evaluators = room
        there = len(self._nodes) + len(self._building)
        if self._deaths <= self.restarts * self.evaluators:
            for _ in range(self.evaluators - there):
                self._spawn()
        elif not there:
            raise ClusterError(
                f"evaluators died {self._deaths} times in a row, the last one so: {self._last}\nThe Ray logs tell what ends "
                "them (memory?)"
            )
        if self.capacity:
            self._spoke = now
        elif now - self._spoke > SILENCE:
            self.say(
                f"no evaluator is at work: building one, or waiting for room on the cluster. {self._last}".rstrip()
            )
            self._spoke = now + 3 * SILENCE

    def _look(self) -> None:
        if self.metrics:
            self.metrics.look(self.there, self.at_work)

    def _spawn(self) -> None:
        options = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_restarts": 0, "max_task_retries": 0}
        options |= {"memory": self.memory} if self.memory else {}
        actor = ray.remote(**options)(self.kind).remote(self.setup, self.threads)

        def build(evaluator: Any) -> str:
            evaluator.build()
            return str(ray.get_runtime_context().get_node_id())

        self._building[actor.__ray_call__.remote(build)] = actor

    def _welcome(self, reference: Any) -> None:
        """Counts an evaluator that is built. One that cannot be is an error only if none could before."""
        actor = self._building.pop(reference)
        try:
            with surfaced("building an evaluator"):
                self._nodes[actor] = ray.get(reference)
        except Exception as error:
            ray.kill(actor)
            if not self._ever and not isinstance(error, ClusterError):
                raise
            self._count_death(f"{type(error).__name__}: {error}")
            return
        self._ever = True
        self._queues[actor] = deque()

    def _start_clock(self, actor: Any) -> None:
        """Starts the clock of the assignment whose turn it is, if it has what it waits for."""
        work = self._works[self._queues[actor][0]] if self._queues[actor] else None
        if work is None or self.seconds is None or work.deadline < math.inf:
            return
        if work.awaits is None or ray.wait([work.awaits], timeout=0)[0]:
            work.started, work.deadline = datetime.now(UTC), time.monotonic() + self.seconds

    def _watch_clock(self, actor: Any) -> list[Finished]:
        """Ends an evaluator that takes too long; that it died is no reason to give up its place."""
        work = self._works[self._queues[actor][0]] if self._queues[actor] else None
        if work is None or time.monotonic() < work.deadline:
            self._start_clock(actor)
            return []
        self._dismiss(actor, but=work)
        error = f"TimeoutError: not measured within {self.seconds:g} s (search.candidate_seconds)"
        return self._finished(work.assignment.ticket, work.started, None, error)

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

    def _collect(self, reference: Any) -> list[Finished]:
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
        self._deaths = 0
        self._displaced.pop(ticket, None)
        if answer.lost and self.shards is not None:
            self.shards.forget()
        return self._finished(ticket, answer.started, answer.measurement, answer.error, answer.lost, answer.worker)

    def _lose(self, work: _Work, error: ray.exceptions.RayError) -> list[Finished]:
        """Replaces an evaluator that is gone."""
        why = f"{type(error).__name__}: {reason(error)}"
        ticket = work.assignment.ticket
        displaced = getattr(error, "preempted", False) or work.node not in alive_nodes()
        unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        self._dismiss(work.actor, but=work)
        if self.metrics:
            self.metrics.lost()
        if displaced:
            idle = [actor for actor, queue in self._queues.items() if not queue]
            for actor in [actor for actor in idle if self._nodes[actor] == work.node]:
                self._dismiss(actor)
        if displaced and self._displaced[ticket] < DISPLACED:
            self._last = "A node was lost."
            self._displaced[ticket] += 1
            self._again.append(work.assignment)
            return []
        if not displaced and not unreachable:
            self._count_death(why)
        self._displaced.pop(ticket, None)
        return self._finished(ticket, work.started, None, why, lost=True)

    def _dismiss(self, actor: Any, but: _Work | None = None) -> None:
        """Ends an evaluator, if it is not dead, and has it replaced at once; what waited there goes elsewhere."""
        ray.kill(actor)
        del self._nodes[actor]
        works = [self._works.pop(reference) for reference in self._queues.pop(actor)]
        self._again.extend(work.assignment for work in works if work is not but and not work.recalled)
        self._looked = -math.inf

    def _finished(self, ticket: str, *what: Any, **more: Any) -> list[Finished]:
        """What came of an assignment; nothing where it was recalled too late, and had come back already."""
        if ticket not in self._open:
            return []
        self._open.remove(ticket)
        return [Finished(ticket, *what, **more)]

    def _count_death(self, why: str) -> None:
        self._deaths += 1
        self._last = why


def alive_nodes() -> set[str]:
    """The nodes that the cluster has now."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _ready(references: list[Any], timeout: float) -> list[Any]:
    """What is done, waiting up to `timeout` seconds for the first."""
    if not references:
        return []
    ready, _ = ray.wait(references, num_returns=1, timeout=timeout)
    if ready:  # whatever else is done already comes along
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    return list(ready)
