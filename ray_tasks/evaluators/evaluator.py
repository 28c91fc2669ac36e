"""Evaluators: actors that keep the pool and one live model per task resident, and measure recipe after recipe."""

import os
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch

from merging.checkpoints.pool import Pool
from merging.checkpoints.vocabulary import Vocabulary
from merging.errors import EngineLostError
from merging.evaluation.engines import EngineSettings
from merging.evaluation.live_models import CandidateModels, LiveModels, MakeSource, best_device, best_devices
from merging.evaluation.score_cache import ScoreCache
from merging.evaluation.steps import EvaluationPlan, Measurement
from merging.faults import is_fault, tells_of_device
from merging.io import fact_cache
from merging.io.secrets import described
from merging.mergers.material import Material, open_statistics
from merging.mergers.resident import ResidentMerger
from merging.recipe import Recipe
from merging.tasks import make_task
from merging.tasks.task import Split, Task
from ray_tasks.evaluators.candidate_log import kept_output
from ray_tasks.evaluators.progress import teller


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
        sources: What statistics are computed from: name → settings, and the member whose head runs on it.
        precision: Of evaluation.
        vocabulary: Whose tokens a merge has.
        facts: What is known of the files, so that nobody reads them whole to recognise them (`merging.io.fact_cache`).
        dtype: Of the models; None for the checkpoints' own.
        engine: What holds candidates; None for live models.
        parts: Bytes of each shard's part of the weights, where shards write these into the evaluator's memory.
        scores: Where predictions are kept and looked for.
    """

    base: str
    members: Mapping[str, str]
    heads: tuple[str, ...]
    statistics: Mapping[str, tuple[str, ...]]
    examples: Mapping[str, int]
    tasks: Mapping[str, Any]
    owners: Mapping[str, str]
    sources: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    precision: str = "float32"
    vocabulary: Vocabulary = "base"
    facts: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    engine: EngineSettings | None = None
    parts: tuple[int, ...] = ()
    scores: ScoreCache | None = None

    def material(self, *, resident: bool = False) -> Material:
        """Opens pool and statistics.

        Args:
            resident: Whether this machine is going to read all of the pool, and more than once.
        """
        fact_cache.learn(self.facts)
        pool = Pool.open(self.base, self.members, self.heads, self.vocabulary)
        statistics = open_statistics(pool, self.statistics)
        if resident:
            pool.copy_here()
            for file in (file for files in statistics.values() for file in files.values()):
                file.copy_here()
        return Material(pool, statistics, self.examples)

    def open_tasks(self) -> list[Task]:
        """Opens every task with its owner's head.

        Raises:
            TaskError: Data or head are unusable.
        """
        heads = {name: self.members[self.owners[name]] for name in self.tasks}
        return [make_task(name, settings, heads[name], self.base) for name, settings in self.tasks.items()]


@dataclass(frozen=True)
class Assignment:
    """A recipe to measure.

    Args:
        ticket: The caller's name for it.
        recipe: What to merge.
        split: Where to measure it.
        limit: At most this many examples per task.
        plan: Steps, and when to stop; None for all at once.
        precision: Of evaluation; None for the setup's.
        fresh: Whether kept scores are left alone.
    """

    ticket: str
    recipe: Recipe
    split: Split
    limit: int | None = None
    plan: EvaluationPlan | None = None
    precision: str | None = None
    fresh: bool = False

    @property
    def candidate(self) -> tuple[str, str]:
        """What is measured, whatever ticket it has this time."""
        return self.recipe.identity, self.split


@dataclass
class Answer:
    """What an evaluator returns: failures are values, so that they are not mistaken for a dead worker.

    Args:
        measurement: The scores; None if it failed.
        error: Type and message of the failure.
        worker: Who did it.
        started: When work on it began, or when it was handed out if its worker died.
        seconds: How long it took; of a pool's answer, how long evaluators were at work on it, in vain or not.
        lost: Whether trying again may help: a worker or its shards were lost.
        unreachable: Whether the evaluator is of no more use: it is cut off from the shards, or its engine has died.
        fault: Whether the failure is about the machine, and says nothing of the recipe: its kind or its text tells.
        ticket: The assignment's, written by the pool.
        log: Of a failure, what was printed and logged, and where in the code it happened.
    """

    measurement: Measurement | None
    error: str | None
    worker: str
    started: datetime
    seconds: float = 0.0
    lost: bool = False
    unreachable: bool = False
    fault: bool = False
    ticket: str = ""
    log: str = ""

    def __post_init__(self) -> None:
        # of what failed in a shard there is only the text
        self.fault = not self.lost and (self.fault or tells_of_device(self.error or ""))


def failed(error: BaseException, worker: str, started: datetime) -> Answer:
    """The answer of an evaluator that met an error."""
    log = "".join(traceback.format_exception(error))
    return Answer(None, described(error), worker, started, fault=is_fault(error), log=log)


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
        self._source: MakeSource = ResidentMerger
        self._models: CandidateModels | None = None

    def build(self) -> str:
        """Opens the pool and loads the models, unless that is done.

        Returns:
            Who this is.

        Raises:
            MergequestError: Pool, statistics or tasks are unusable.
        """
        if self._models is None:
            setup, tasks = self._setup, self._setup.open_tasks()
            material = setup.material(resident=self._source is ResidentMerger)
            models = self._candidates(material, tasks)
            models.scores = setup.scores
            self._models = models
        return self._worker

    def measure(self, assignment: Assignment) -> Answer:
        """Merges and evaluates; whatever goes wrong is part of the answer."""
        started, begin = datetime.now(UTC), time.perf_counter()
        with kept_output() as output:
            answer = self._answer(assignment, started)
        answer.log = f"{output()}{answer.log}" if answer.error is not None else ""
        answer.seconds = time.perf_counter() - begin
        return answer

    def _answer(self, assignment: Assignment, started: datetime) -> Answer:
        try:
            self.build()
            assert self._models is not None
            request = assignment.recipe, assignment.split, assignment.limit, assignment.plan
            how = assignment.precision, assignment.fresh
            measurement = self._models.measure(*request, teller(assignment.ticket), *how)
        except EngineLostError as error:
            return Answer(None, described(error), self._worker, started, lost=True, unreachable=True)
        except (Exception, SystemExit) as error:
            return failed(error, self._worker, started)
        return Answer(replace(measurement, worker=self._worker), None, self._worker, started)

    def _candidates(self, material: Material, tasks: Sequence[Task]) -> CandidateModels:
        """What holds the candidates."""
        setup, source = self._setup, self._source
        if setup.engine is None or setup.engine.kind == "transformers":
            # over several devices, a model is built in main memory
            devices = best_devices() if torch.cuda.device_count() > 1 else []
            device = torch.device("cpu") if devices else self._device
            return LiveModels(material, tasks, setup.owners, device, setup.precision, source, setup.dtype, devices)
        from merging.evaluation.engines.engine_models import EngineModels

        # what shards send waits in main memory; the device is the engine's
        device = self._device if source is ResidentMerger else torch.device("cpu")
        return EngineModels(material, tasks, setup.owners, device, setup.engine, source, setup.dtype)
