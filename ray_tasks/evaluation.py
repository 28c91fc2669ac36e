"""Evaluators: actors that keep the pool and one live model a task resident, and measure recipe after recipe."""

import os
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray
import torch

from merging.errors import ClusterError
from merging.live import LiveModels, Measurement, best_device
from merging.merge import Material, open_statistics
from merging.pool import Pool
from merging.recipe import Recipe
from merging.tasks import make_task
from merging.tasks.base import Split
from ray_tasks.failures import surfaced


@dataclass(frozen=True)
class Setup:
    """What an evaluator needs to build itself on any node: paths and settings, no tensors.

    Args:
        base: The base's directory.
        members: Member → directory.
        heads: Patterns of tensors that are kept per task.
        statistics: Member (or `base`) → statistics files.
        examples: Member → number of training examples.
        tasks: Task → its settings.
        owners: Task → the member whose head it is evaluated with.
        precision: Of evaluation.
    """

    base: str
    members: Mapping[str, str]
    heads: tuple[str, ...]
    statistics: Mapping[str, tuple[str, ...]]
    examples: Mapping[str, int]
    tasks: Mapping[str, Any]
    owners: Mapping[str, str]
    precision: str = "float32"

    def material(self) -> Material:
        """Opens pool and statistics."""
        pool = Pool.open(self.base, self.members, self.heads)
        return Material(pool, open_statistics(pool, self.statistics), self.examples)


@dataclass(frozen=True)
class Assignment:
    """A recipe to measure.

    Args:
        ticket: The caller's name for it.
        recipe: What to merge.
        split: Where to measure it.
        limit: At most this many examples a task.
    """

    ticket: str
    recipe: Recipe
    split: Split
    limit: int | None = None


@dataclass(frozen=True)
class Finished:
    """What came of an assignment.

    Args:
        ticket: The caller's name for it.
        measurement: The scores; None if it failed.
        error: Type and message of the failure.
        lost: Whether its worker died, so that trying again may help.
        worker: Who did it.
        started: When work on it began, or when it was handed out if its worker died.
    """

    ticket: str
    started: datetime
    measurement: Measurement | None = None
    error: str | None = None
    lost: bool = False
    worker: str | None = None


@dataclass
class _Answer:
    """What an evaluator returns: failures are values, so that they are not mistaken for a dead worker."""

    measurement: Measurement | None
    error: str | None
    worker: str
    started: datetime


class Evaluator:
    """The actor's inside: one process, one device.

    Args:
        setup: What to build.
        threads: Torch threads.
    """

    def __init__(self, setup: Setup, threads: int) -> None:
        torch.set_num_threads(threads)
        self._setup = setup
        self._device = best_device()
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{self._device}"
        self._models: LiveModels | None = None

    def build(self) -> str:
        """Opens the pool and loads the models, unless that is done.

        Returns:
            Who this is.

        Raises:
            MergequestError: Pool, statistics or tasks are unusable.
        """
        if self._models is None:
            setup = self._setup
            tasks = [
                make_task(name, settings, setup.members[setup.owners[name]]) for name, settings in setup.tasks.items()
            ]
            self._models = LiveModels(setup.material(), tasks, setup.owners, self._device, setup.precision)
        return self._worker

    def measure(self, assignment: Assignment) -> _Answer:
        """Merges and evaluates; whatever goes wrong is part of the answer."""
        started = datetime.now(UTC)
        try:
            self.build()
            assert self._models is not None
            measurement = self._models.measure(assignment.recipe, assignment.split, assignment.limit)
        except Exception as error:
            return _Answer(None, f"{type(error).__name__}: {error}", self._worker, started)
        return _Answer(measurement, None, self._worker, started)


@dataclass
class EvaluatorPool:
    """Evaluators that take assignments as they become free; a dead one is replaced, its assignment reported as lost.

    Args:
        setup: What each evaluator builds.
        evaluators: How many.
        threads: CPUs and torch threads of each.
        gpus: GPUs of each.
        restarts: How often one evaluator may die before the pool gives it up.
    """

    setup: Setup
    evaluators: int
    threads: int = 1
    gpus: float = 0.0
    restarts: int = 3
    _idle: deque[Any] = field(default_factory=deque, init=False)
    _busy: dict[Any, tuple[Any, Assignment, datetime]] = field(default_factory=dict, init=False)
    _actors: list[Any] = field(default_factory=list, init=False)
    _deaths: int = field(default=0, init=False)

    def start(self, timeout: float = 600.0) -> list[str]:
        """Starts the evaluators and waits until they are built.

        Returns:
            Who they are.

        Raises:
            MergequestError: Building failed: the evaluator's own error.
            ClusterError: The cluster has no room for them within `timeout` seconds.
        """
        self._actors = [self._spawn() for _ in range(self.evaluators)]
        self._idle.extend(self._actors)
        names = [actor.build.remote() for actor in self._actors]
        try:
            with surfaced("building an evaluator"):
                return list(ray.get(names, timeout=timeout))
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"{self.evaluators} evaluators did not start within {timeout:.0f} s: the cluster has no room for them now"
            ) from error

    @property
    def capacity(self) -> int:
        """How many assignments are worked on at once."""
        return len(self._actors)

    def submit(self, assignment: Assignment) -> None:
        """Hands an assignment to a free evaluator.

        Raises:
            ClusterError: None is free.
        """
        if not self._idle:
            raise ClusterError("every evaluator is busy")
        actor = self._idle.popleft()
        self._busy[actor.measure.remote(assignment)] = (actor, assignment, datetime.now(UTC))

    def wait(self, timeout: float) -> list[Finished]:
        """Assignments that finished within `timeout` seconds; returns at the first."""
        if not self._busy:
            return []
        ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=timeout)
        if ready:  # whatever else is done already comes along
            ready, _ = ray.wait(list(self._busy), num_returns=len(self._busy), timeout=0)
        return [self._collect(reference) for reference in ready]

    def close(self) -> None:
        """Ends the evaluators."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        self._idle.clear()
        self._busy.clear()

    def _collect(self, reference: Any) -> Finished:
        actor, assignment, handed = self._busy.pop(reference)
        try:
            answer: _Answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._replace(actor)
            reason = str(error).strip().splitlines()[0]
            return Finished(assignment.ticket, handed, None, f"{type(error).__name__}: {reason}", lost=True)
        self._idle.append(actor)
        return Finished(assignment.ticket, answer.started, answer.measurement, answer.error, worker=answer.worker)

    def _replace(self, actor: Any) -> None:
        """Puts a new evaluator in a dead one's place."""
        self._actors.remove(actor)
        self._deaths += 1
        if self._deaths > self.restarts * self.evaluators and not self._actors:
            raise ClusterError(f"evaluators died {self._deaths} times: see the Ray logs for what ends them (memory?)")
        if self._deaths <= self.restarts * self.evaluators:
            successor = self._spawn()
            self._actors.append(successor)
            self._idle.append(successor)

    def _spawn(self) -> Any:
        remote = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)(Evaluator)
        return remote.remote(self.setup, self.threads)
