"""What the search itself costs per candidate, as the history grows: evaluators that sleep, everything else real.

    python benchmarks/driver_overhead.py --candidates 10000 --slots 16 --sampler tpe --sleep 0.01
    python benchmarks/driver_overhead.py --candidates 4000 --sampler nsga2 --methods regmean

Six methods unless told otherwise, subsets and per-member factors of eight members, the ledger with its
fsync. For every tenth of the history: the driver's CPU time per candidate, its wall time without the waiting for evaluators
(disk and busy neighbours are in it), the share of time that evaluators were at work, peak memory and ledger.
"""

import argparse
import json
import resource
import tempfile
import time
from heapq import heappop, heappush
from pathlib import Path

from merging.tasks.task import Score
from search.budget import Budget, Progress
from search.candidate import Candidate, Measurement, Outcome, Provenance
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.loop import search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler, memories
from search.space.method_space import MethodSpace
from search.space.search_space import Space
from search.study import build_study

MEMBERS = tuple("abcdefgh")
METHODS = ("average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean")


class Sleeping:
    """Evaluators that answer after a while, in the driver's own process: nothing runs beside it.

    As the campaign's own, each of several holds a second candidate, with which it goes on by itself.

    Args:
        slots: How many.
        sleep: Seconds that each takes for a candidate.
    """

    def __init__(self, slots: int, sleep: float) -> None:
        self.slots, self.capacity = slots, slots * (2 if slots > 1 else 1)
        self.busy = self.waited = 0.0
        self._free_at = [0.0] * slots
        self._sleep = sleep
        self._due: list[tuple[float, int, Candidate]] = []
        self._count = 0

    def submit(self, candidate: Candidate) -> None:
        """Starts its clock."""
        self._count += 1
        self.busy += self._sleep
        ends = max(time.perf_counter(), heappop(self._free_at)) + self._sleep
        heappush(self._free_at, ends)
        heappush(self._due, (ends, self._count, candidate))

    def wait(self, timeout: float) -> list[Outcome]:
        """Whatever is due, waiting for the first."""
        started = time.perf_counter()
        time.sleep(max(0.0, self._due[0][0] - started))
        now = time.perf_counter()
        self.waited += now - started
        result = []
        while self._due and self._due[0][0] <= now:
            candidate = heappop(self._due)[2]
            result.append(Outcome(candidate, Measurement(_scores(candidate), 0.0, self._sleep, "host/1/cpu")))
        return result


def _scores(candidate: Candidate) -> dict[str, Score]:
    """Four tasks; more members are better, and factors near 0.6."""
    scaling = candidate.recipe.scaling
    value = 0.4 + 0.05 * len(scaling) - sum((factor - 0.6) ** 2 for factor in scaling.values()) / 20
    return {f"task{i}": Score(value - i / 100, 0.01, 200, "accuracy", 1.0, 1 - value, 0.01) for i in range(4)}


class Watch:
    """Prints a line for every tenth of the history."""

    def __init__(self, executor: Sleeping, directory: Path, every: int) -> None:
        self._executor, self._directory, self._every = executor, directory, every
        self._then = (0, time.perf_counter(), time.process_time(), 0.0, 0.0)

    def on_start(self, progress: Progress) -> None:
        """Prints the head."""
        print("| candidates | CPU ms | wall ms | evaluators at work | peak MB | ledger kB | files |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|")
        self._then = (progress.done, time.perf_counter(), time.process_time(), 0.0, 0.0)

    def on_row(self, row: Row, progress: Progress) -> None:
        """Prints a line now and then."""
        seen = self._then[0]
        if progress.done == seen or (progress.done // self._every == seen // self._every and progress.done != 100):
            return
        now = (progress.done, time.perf_counter(), time.process_time(), self._executor.waited, self._executor.busy)
        rows, wall, cpu, waited, busy = (b - a for a, b in zip(self._then, now, strict=True))
        self._then = now
        files = [file.stat().st_size for file in (self._directory / "ledger").glob("*.parquet")]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        share = min(1.0, busy / (wall * self._executor.slots))
        print(
            f"| {progress.done} | {1e3 * cpu / rows:.1f} | {1e3 * (wall - waited) / rows:.1f} | {share:.0%} | {peak:.0f} | "
            f"{sum(files) / 1e3:.0f} | {len(files)} |",
            flush=True,
        )


def main() -> None:
    """Runs one search and opens what it left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=8, help="evaluators")
    parser.add_argument("--sleep", type=float, default=0.01, help="seconds of an evaluation")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--arguments", type=json.loads, default={}, help="the sampler's, as JSON")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--all-members", action="store_true", help="no subsets, for samplers without categories")
    parser.add_argument("--history", type=int, default=500, help="finished trials that tpe and gp see; 0 for all")
    chosen = parser.parse_args()
    subsets = None if chosen.all_members else [MEMBERS[: size + 1] for size in range(1, len(MEMBERS))]
    space = Space({method: MethodSpace() for method in chosen.methods}, MEMBERS, subsets, "per_member")
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        ledger = Ledger(str(directory / "ledger"), "overhead")
        executor = Sleeping(chosen.slots, chosen.sleep)
        study = build_study(ledger, space)
        search(
            study,
            space,
            lambda number: make_sampler(chosen.sampler, 0, chosen.arguments, number),
            ledger,
            executor,
            make_objective("mean", [f"task{i}" for i in range(4)]),
            Provenance("overhead"),
            Budget(chosen.candidates),
            Watch(executor, directory, max(1, chosen.candidates // 10)),
            history=memories(chosen.sampler, chosen.arguments, chosen.history or None),
        )
        started = time.perf_counter()
        ledger = Ledger(str(directory / "ledger"), "overhead")
        opened = time.perf_counter()
        build_study(ledger, space)
        print(
            f"\nresuming: {opened - started:.1f} s to open the ledger, {time.perf_counter() - opened:.1f} s the study"
        )


if __name__ == "__main__":
    main()
