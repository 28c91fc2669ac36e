"""Evaluators that come and go: built where there is room, replaced when they die, more of them as the cluster grows."""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from merging.errors import ClusterError
from merging.faults import is_fault, tells_of_device
from ray_tasks.cluster_errors import surfaced
from ray_tasks.connect import NodeKind, alive_nodes
from ray_tasks.evaluators.evaluator import Evaluator
from ray_tasks.evaluators.progress import forget

LOOK = 5.0
"""Seconds between two looks at how many evaluators there are and could be."""
BLAMED = 2
"""Candidates that failed on a node and were measured elsewhere, after which no evaluator is started there."""
SILENCE = 30.0
"""Seconds without any evaluator after which that is said, and again after four times as long."""


@dataclass
class EvaluatorGroup:
    """Who is there to work.

    Evaluators count from when they are built: where the cluster has no room for one, it joins when there is room, and
    until then nothing waits for it.

    Args:
        setup: What each evaluator builds.
        evaluators: How many to have, whether or not there is room for all of them now.
        threads: CPUs and torch threads of each.
        gpus: GPUs of each.
        restarts: How often each may die before any of them answers, until dead ones are no longer replaced.
        room: Says how many the cluster would hold by now, where their number shall grow with it.
        say: Told, in a line for users, when there is no evaluator left to wait for, or more of them.
        kind: The class of the actors: made of `setup` and `threads`, with `build()` and `measure(assignment)`.
        memory: Bytes that each asks its node for; 0 for none.
        nodes: Which nodes they may be started on.
    """

    setup: Any
    evaluators: int
    threads: int = 1
    gpus: float = 0.0
    restarts: int = 3
    room: Callable[[], int] | None = None
    say: Callable[[str], None] = lambda text: None
    kind: type[Any] = Evaluator
    memory: int = 0
    nodes: NodeKind = field(default_factory=NodeKind)
    _building: dict[Any, Any] = field(default_factory=dict, init=False)
    _started: dict[Any, Any] = field(default_factory=dict, init=False)
    _nodes: dict[Any, str] = field(default_factory=dict, init=False)
    _blamed: Counter[str] = field(default_factory=Counter, init=False)
    _avoided: set[str] = field(default_factory=set, init=False)
    _ever: bool = field(default=False, init=False)
    _deaths: int = field(default=0, init=False)
    _last: str = field(default="", init=False)
    _looked: float = field(default=-math.inf, init=False)
    _spoke: float | None = field(default=None, init=False)

    @property
    def there(self) -> int:
        """How many evaluators are built."""
        return len(self._nodes)

    @property
    def building(self) -> Collection[Any]:
        """References that are ready when another evaluator is built, or cannot be: for `add`."""
        return self._building.keys()

    def node(self, actor: Any) -> str:
        """Where an evaluator is."""
        return self._nodes[actor]

    def reconcile(self) -> None:
        """Now and then: replaces who died, grows with the cluster, and says so when nobody is there.

        Raises:
            ClusterError: Evaluators die as fast as they are replaced, and none is left.
        """
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
        if self._nodes or self._spoke is None:
            self._spoke = now
        elif now - self._spoke > SILENCE:
            self.say(
                f"no evaluator is at work: building one, or waiting for room on the cluster. {self._last}".rstrip()
            )
            self._spoke = now + 3 * SILENCE

    def add(self, reference: Any) -> Any:
        """Counts an evaluator that is built. One that cannot be is an error only if none could before.

        Returns:
            The evaluator; None where it could not be built.

        Raises:
            MergequestError: Building the first one failed: the evaluator's own error.
        """
        actor = self._building.pop(reference)
        started = self._started.pop(actor, None)
        try:
            with surfaced("building an evaluator"):
                self._nodes[actor] = ray.get(reference)
        except Exception as error:
            ray.kill(actor)
            sick = is_fault(error) or tells_of_device(str(error))
            others = self._nodes or self._building  # one sound device is enough to begin with
            if not self._ever and not isinstance(error, ClusterError) and not (sick and others):
                raise
            self.count_death(f"{type(error).__name__}: {error}")
            cause = getattr(error, "cause", None) or error
            why = f"{type(cause).__name__}: {cause}"
            with suppress(ray.exceptions.RayError):  # of one that died before it began, nobody knows where
                self.blame(ray.get(started, timeout=1.0), why, "evaluators could not be built there")
            return None
        self._ever = True
        return actor

    def remove(self, actor: Any) -> None:
        """Ends an evaluator, if it is not dead, and has it replaced at the next `reconcile`."""
        ray.kill(actor)
        forget(actor)
        del self._nodes[actor]
        self._looked = -math.inf

    def count_death(self, why: str) -> None:
        """An evaluator died, and its node is sound."""
        self._deaths += 1
        self._last = why

    def count_lost_node(self) -> None:
        """A node was lost, which is nobody's fault."""
        self._last = "A node was lost."

    def blame(self, node: str, why: str, what: str = "candidates failed there that were measured elsewhere") -> None:
        """Something failed on a node, and not because of a recipe: a candidate that was measured elsewhere, or a building.

        After the second one nothing is started on that node any more, where there is another to start it on; else there
        is one evaluator less.
        """
        self._blamed[node] += 1
        if self._blamed[node] < BLAMED:
            return
        del self._blamed[node]
        alive = {entry["NodeID"]: entry for entry in alive_nodes()}
        name = alive.get(node, {}).get("NodeManagerHostname", node[:8])
        reason = f"{BLAMED} {what}, the last with {why.partition(chr(10))[0]}"
        if any(self._fits(entry) for key, entry in alive.items() if key not in {*self._avoided, node}):
            self._avoided.add(node)
            self.say(f"no more evaluators are started on node {name}: {reason}")
        elif self.evaluators > 1:
            self.evaluators -= 1
            self.say(f"one evaluator less on node {name}, {self.evaluators} now: {reason}")

    def _fits(self, node: Any) -> bool:
        """Whether a node is large enough for an evaluator."""
        there = node["Resources"]
        large = there.get("CPU", 0) >= self.threads and there.get("GPU", 0) >= self.gpus
        return bool(large and self.nodes.fits(node))

    def count_answer(self) -> None:
        """One of them answered: they are no crash loop."""
        self._deaths = 0

    def close(self) -> None:
        """Ends all."""
        for actor in [*self._nodes, *self._building.values()]:
            ray.kill(actor)
            forget(actor)
        self._nodes.clear()
        self._building.clear()
        self._started.clear()

    def _spawn(self) -> None:
        options: dict[str, Any] = {"num_cpus": self.threads, "num_gpus": self.gpus}
        options |= {"max_restarts": 0, "max_task_retries": 0}
        options |= self.nodes.options(self._avoided) | ({"memory": self.memory} if self.memory else {})
        actor = ray.remote(**options)(self.kind).remote(self.setup, self.threads)

        def place(evaluator: Any) -> str:
            return str(ray.get_runtime_context().get_node_id())

        def build(evaluator: Any) -> str:
            evaluator.build()
            return place(evaluator)

        self._started[actor] = actor.__ray_call__.remote(place)
        self._building[actor.__ray_call__.remote(build)] = actor
