"""How busy the driver keeps evaluators: real Ray actors, real search, ledger and study.

    python benchmarks/evaluators_busy.py --evaluators 64 --rounds 32 --sleep 20
    python benchmarks/evaluators_busy.py --merge --evaluators 8
    python benchmarks/evaluators_busy.py --merge --shared 2 --evaluators 2 8 16 --candidates 256

Without `--merge` the actors are light (no torch, no CPU reserved) and sleep instead of computing, so that many of them run on
a small machine; pool, executor and driver are the campaign's own. With it they are the campaign's own evaluators: each merges
small encoders (four members, data-free methods) and evaluates them. Each is a process with torch, of 300 MB; where they share
cores, a candidate takes as long as its share of them. With `--shared P` the N evaluators are
processes that have their candidates merged and evaluated by P of the campaign's own evaluators, which hold pool and models:
pool, executor and driver see N evaluators, and every score is that of a merged model. `busy` is the time that
evaluators slept or were at work, over all evaluators and the whole run from the first candidate handed out to the last row;
the last round, in which some have nothing left to do, is in it.
"""

import argparse
import os
import pickle
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import torch

from flows.campaign.executor import RayExecutor
from merging.evaluation.steps import Measurement
from merging.tasks import CustomSettings
from merging.tasks.task import Score
from ray_tasks.connect import connect
from ray_tasks.evaluators.evaluator import Answer, Assignment, Evaluator, Setup
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from search.budget import Budget
from search.candidate import Provenance
from search.ledger.ledger import Ledger
from search.loop import search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler, memories
from search.space.method_space import MethodSpace
from search.space.search_space import Space
from search.study import build_study

MEMBERS = tuple("abcdefgh")
METHODS = ("average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean")


class Sleeper:
    """An evaluator that sleeps `setup` seconds."""

    def __init__(self, setup: float, threads: int) -> None:
        self._seconds = setup

    def build(self) -> None:
        """Has nothing to build."""

    def measure(self, ticket: SimpleNamespace) -> Any:
        """Sleeps."""
        started = datetime.now(UTC)
        time.sleep(self._seconds)
        return SimpleNamespace(
            measurement=None,
            error=None,
            worker="here",
            started=started,
            seconds=0.0,
            lost=False,
            unreachable=False,
            fault=False,
        )


class LightPool(EvaluatorPool):
    """Sends tickets alone, for whole assignments would import torch where they arrive; scores are made up here."""

    def submit(self, assignment: Assignment) -> None:
        """Hands out the ticket."""
        light: Any = SimpleNamespace(ticket=assignment.ticket, candidate=assignment.candidate, recipe=None)
        super().submit(light)

    def wait(self, timeout: float) -> list[Answer]:
        """What finished, with scores."""
        answers = super().wait(timeout)
        return [Answer(_scores(int(a.ticket)), None, a.worker, a.started, ticket=a.ticket) for a in answers]


class Merging(Evaluator):
    """A campaign's evaluator, whose workers find this file."""

    def __init__(self, setup: Setup, threads: int) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        super().__init__(setup, 1)


class CountingPool(EvaluatorPool):
    """Adds up how long evaluators were at work."""

    seconds_at_work = 0.0

    def wait(self, timeout: float) -> list[Answer]:
        """As ever."""
        answers = super().wait(timeout)
        self.seconds_at_work += sum(answer.seconds for answer in answers)
        return answers


class Relay:
    """An evaluator that has another process merge and evaluate, and hands on unopened what that says."""

    def __init__(self, shared: list[Any], threads: int) -> None:
        self._shared = shared[os.getpid() % len(shared)]

    def build(self) -> None:
        """Has nothing to build."""

    def measure(self, work: SimpleNamespace) -> Any:
        """Has it measured."""
        started, begin = datetime.now(UTC), time.perf_counter()
        payload = ray.get(self._shared.measure.remote(work.payload))
        return SimpleNamespace(
            measurement=None,
            payload=payload,
            error=None,
            worker="here",
            started=started,
            seconds=time.perf_counter() - begin,
            lost=False,
            unreachable=False,
            fault=False,
        )


class Shared:
    """A campaign's evaluator that several relays share."""

    def __init__(self, setup: Any) -> None:
        self._evaluator = Merging(setup, 1)

    def measure(self, payload: bytes) -> bytes:
        """Measures an assignment."""
        return pickle.dumps(self._evaluator.measure(pickle.loads(payload)))


class RelayPool(CountingPool):
    """Sends assignments closed, to be opened where they are measured."""

    def submit(self, assignment: Assignment) -> None:
        """Hands it out."""
        light: Any = SimpleNamespace(
            ticket=assignment.ticket, candidate=assignment.candidate, recipe=None, payload=pickle.dumps(assignment)
        )
        super().submit(light)

    def wait(self, timeout: float) -> list[Answer]:
        """What finished, opened."""
        answers = []
        for light in super().wait(timeout):
            answer: Answer = pickle.loads(light.payload)  # type: ignore[attr-defined]
            answer.ticket, answer.seconds = light.ticket, light.seconds
            answers.append(answer)
        return answers


def megabytes(*classes: str) -> float:
    """Memory of its own that a process of such an actor has, in the mean."""
    own = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(f"ray::{name}" in " ".join(process.cmdline()) for name in classes):
                own.append(process.memory_full_info().uss)
        except psutil.Error:
            continue
    return sum(own) / max(1, len(own)) / 1e6


def score(model: Any, checkpoint: str, split: str, limit: int | None) -> float:
    """How little a model says, for a number that depends on all of its weights."""
    with torch.inference_mode():
        states = model(input_ids=torch.arange(5, 69).view(4, 16)).last_hidden_state
    return float(1 / (1 + states.std()))


def small_pool(place: Path) -> Setup:
    """Encoders of half a million parameters, and a task that each of them is evaluated on."""
    from transformers import BertConfig, BertModel

    for seed, name in enumerate(("base", *MEMBERS[:4])):
        torch.manual_seed(seed)
        BertModel(
            BertConfig(
                hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, vocab_size=1000
            )
        ).save_pretrained(place / name)
    settings = CustomSettings(evaluator="evaluators_busy:score", model_class="AutoModel")
    members = {name: str(place / name) for name in MEMBERS[:4]}
    tasks = {f"task{number}": settings for number in range(4)}
    return Setup(str(place / "base"), members, (), {}, {}, tasks, dict.fromkeys(tasks, "a"))


def _scores(number: int) -> Measurement:
    value = (number * 0.6180339887) % 1.0
    scores = {f"task{i}": Score(value - i / 100, 0.01, 200, "accuracy", 1.0, 1 - value, 0.01) for i in range(4)}
    return Measurement(scores, 0.0, 1.0)


def measure(evaluators: int, candidates: int, sleep: float | None, sampler: str, shared: int = 0) -> str:
    """One search; a line of the table. Without `sleep`, of evaluators that merge, in so many processes that they share."""
    methods, members = (METHODS, MEMBERS) if sleep is not None else (METHODS[:3], MEMBERS[:4])
    space = Space({method: MethodSpace() for method in methods}, members, None, "per_member")
    with tempfile.TemporaryDirectory() as place:
        pool: LightPool | CountingPool
        servers: list[Any] = []
        if sleep is not None:
            pool = LightPool(EvaluatorGroup(sleep, evaluators, threads=0, kind=Sleeper))
        elif shared:
            setup = small_pool(Path(place))
            servers = [ray.remote(num_cpus=0)(Shared).remote(setup) for _ in range(shared)]
            pool = RelayPool(EvaluatorGroup(servers, evaluators, threads=0, kind=Relay))
        else:
            pool = CountingPool(EvaluatorGroup(small_pool(Path(place)), evaluators, threads=0, kind=Merging))
        ledger = Ledger(str(Path(place) / "ledger"), "busy")
        try:
            start = time.perf_counter()
            pool.start(grace=600.0)
            start = time.perf_counter() - start
            study = build_study(ledger, space)
            wall, cpu = time.perf_counter(), time.process_time()
            search(
                study,
                space,
                lambda number: make_sampler(sampler, 0, None, number),
                ledger,
                RayExecutor(pool, None),
                make_objective("mean", [f"task{i}" for i in range(4)]),
                Provenance("busy"),
                Budget(candidates),
                history=memories(sampler),
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            memory = megabytes("Sleeper", "Merging", "Relay")
        finally:
            pool.close()
            for server in servers:
                server.__ray_terminate__.remote()
        rows = len(ledger.rows())
    worked = rows * sleep if sleep is not None else pool.seconds_at_work
    busy = worked / (wall * evaluators)
    return (
        f"| {evaluators} | {start:.0f} | {worked / rows:.3g} | {rows} | {wall:.1f} | {rows / wall:.1f} | {busy:.1%} | "
        f"{1e3 * cpu / rows:.1f} | {memory:.0f} |"
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluators", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=20, help="candidates of each evaluator")
    parser.add_argument("--candidates", type=int, help="of every run, in place of rounds")
    parser.add_argument("--most", type=int, default=2000, help="candidates of a run at most")
    parser.add_argument("--sleep", type=float, default=2.0, help="seconds of an evaluation")
    parser.add_argument("--merge", action="store_true", help="merge and evaluate small models instead")
    parser.add_argument("--shared", type=int, default=0, help="with --merge: processes that merge for all evaluators")
    parser.add_argument("--sampler", default="tpe")
    chosen = parser.parse_args()
    print(
        "| evaluators | start s | s each | candidates | s | candidates / s | busy | driver CPU ms / candidate | MB each |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    with connect():
        for evaluators in chosen.evaluators:
            candidates = chosen.candidates or min(chosen.most, chosen.rounds * evaluators)
            sleep = None if chosen.merge else chosen.sleep
            print(measure(evaluators, candidates, sleep, chosen.sampler, chosen.shared), flush=True)


if __name__ == "__main__":
    main()
