"""How busy the driver keeps evaluators: real Ray actors, real search, ledger and study.

    python benchmarks/evaluators_busy.py --evaluators 64 --rounds 32 --sleep 20
    python benchmarks/evaluators_busy.py --merge --evaluators 8
    python benchmarks/evaluators_busy.py --merge --forked --evaluators 64 --rounds 32

Without `--merge` the actors are light (no torch, no CPU reserved) and sleep instead of computing, so that many of them run on
a small machine; pool, executor and driver are the campaign's own. With it they are the campaign's own evaluators: each merges
small encoders (four members, data-free methods) and evaluates them. Each is a process with torch, of 300 MB; where they share
cores, a candidate takes as long as its share of them. With `--forked` each is a light actor with a campaign's own evaluator in
a process beside it, a fork of one that has imported all: it shares the imports' memory, and has its own models and merges.
`MB each` is memory that no other process shares, of both. They have less
priority than the driver, which on a cluster has a core to itself. `busy` is the time that
evaluators slept or were at work, over all evaluators and the whole run from the first candidate handed out to the last row;
the last round, in which some have nothing left to do, is in it.
"""

import argparse
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from flows.campaign.executor import RayExecutor
from merging.evaluation.steps import Measurement
from merging.recipe import Recipe
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
    """An evaluator whose work is done in a process beside it; hands on unopened what that says."""

    def __init__(self, setup: tuple[str, bytes], threads: int) -> None:
        address, content = setup
        self._beside: Any = Client(address)
        self._beside.send_bytes(content)

    def build(self) -> None:
        """Waits until the process beside it is built."""
        self._beside.recv_bytes()

    def measure(self, work: SimpleNamespace) -> Any:
        """Has it measured."""
        started, begin = datetime.now(UTC), time.perf_counter()
        self._beside.send_bytes(work.payload)
        return SimpleNamespace(
            measurement=None,
            payload=self._beside.recv_bytes(),
            error=None,
            worker="here",
            started=started,
            seconds=time.perf_counter() - begin,
            lost=False,
            unreachable=False,
            fault=False,
        )


@contextmanager
def fork_server(place: Path, setup: Setup) -> Iterator[tuple[str, int]]:
    """A process that forks an evaluator for everyone who connects; yields its address and its number.

    It has measured a candidate itself, so that what it imported and compiled lies in memory that its forks share.
    """
    address = str(place / "evaluators")
    listener = Listener(address, "AF_UNIX", backlog=128)
    if (server := os.fork()) == 0:
        fork_for_all(listener, setup)
    try:
        yield address, server
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        listener.close()


def fork_for_all(listener: Listener, setup: Setup) -> None:
    """Measures a candidate, then forks for everyone who connects."""
    try:
        os.nice(15)  # as Ray's own workers: on a cluster they take nothing of the driver's core
        first = Recipe("ties", dict.fromkeys(setup.members, 0.5))
        assert Merging(setup, 1).measure(Assignment("", first, "validation")).error is None
        gc.collect()
        gc.freeze()  # pages that the collector writes to are shared no more
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            with listener.accept() as connection:
                if os.fork() == 0:
                    serve(connection)
    finally:
        os._exit(1)


def serve(connection: Any) -> None:
    """Is an evaluator for the one at the other end, until that is gone."""
    try:
        evaluator = Merging(pickle.loads(connection.recv_bytes()), 1)
        connection.send_bytes(evaluator.build().encode())
        while True:
            connection.send_bytes(pickle.dumps(evaluator.measure(pickle.loads(connection.recv_bytes()))))
    finally:
        os._exit(0)


class RelayPool(CountingPool):
    """Sends assignments closed, to be opened where they are measured."""

    def submit(self, assignment: Assignment) -> None:
        """Hands it out; one that is taken back from another evaluator is closed already."""
        if isinstance(assignment, SimpleNamespace):
            super().submit(assignment)
            return
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


def megabytes(server: int | None) -> float:
    """Memory of their own that all evaluators have, with the forks of a server."""
    own = 0
    for process in psutil.Process().children(recursive=True):
        try:
            is_actor = any(f"ray::{name}" in " ".join(process.cmdline()) for name in ("Sleeper", "Merging", "Relay"))
            if is_actor or process.ppid() == server:
                own += process.memory_full_info().uss
        except psutil.Error:
            continue
    return own / 1e6


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


def measure(evaluators: int, candidates: int, sleep: float | None, sampler: str, forked: bool = False) -> str:
    """One search; a line of the table. Without `sleep`, of evaluators that merge, if need be in forked processes."""
    methods, members = (METHODS, MEMBERS) if sleep is not None else (METHODS[:3], MEMBERS[:4])
    space = Space({method: MethodSpace() for method in methods}, members, None, "per_member")
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        pool: LightPool | CountingPool
        server: int | None = None
        if sleep is not None:
            pool = LightPool(EvaluatorGroup(sleep, evaluators, threads=0, kind=Sleeper))
        elif forked:
            setup = small_pool(Path(place))
            address, server = stack.enter_context(fork_server(Path(place), setup))
            stack.enter_context(connect())
            pool = RelayPool(EvaluatorGroup((address, pickle.dumps(setup)), evaluators, threads=0, kind=Relay))
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
            memory = megabytes(server) / evaluators
        finally:
            pool.close()
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
    parser.add_argument(
        "--forked", action="store_true", help="with --merge: evaluators that share their imports' memory"
    )
    parser.add_argument("--sampler", default="tpe")
    chosen = parser.parse_args()
    print(
        "| evaluators | start s | s each | candidates | s | candidates / s | busy | driver CPU ms / candidate | MB each |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    # a fork server is older than Ray in its process, whose threads no fork has
    with nullcontext() if chosen.forked else connect():
        for evaluators in chosen.evaluators:
            candidates = chosen.candidates or min(chosen.most, chosen.rounds * evaluators)
            sleep = None if chosen.merge else chosen.sleep
            print(measure(evaluators, candidates, sleep, chosen.sampler, chosen.forked), flush=True)


if __name__ == "__main__":
    main()
