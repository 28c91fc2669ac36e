"""Runs a one-worker search twice: unbroken, and killed at random moments and resumed until it is done.

Run as `python kill_and_resume.py DIRECTORY CANDIDATES KILLS SEED SAMPLER`; it leaves DIRECTORY/unbroken and
DIRECTORY/broken. This process imports everything once and forks a driver for every attempt. Driver, study, ledger and
SIGKILL are real; the evaluator is a formula that sleeps.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from merging.tasks.task import Score
from search.candidate import Measurement, Outcome, Provenance
from search.ledger.ledger import Ledger
from search.loop import Budget, search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler
from search.space.search_space import MethodSpace, Space
from search.study import build_study

SPACE = Space(
    {"task_arithmetic": MethodSpace(), "ties": MethodSpace(), "average": MethodSpace()},
    "abc",
    None,
    "per_member",
)


class Serial:
    """Evaluates in the driver's own process, and notes every evaluation that was finished."""

    capacity = 1

    def __init__(self, notes):
        self.notes, self.candidate = notes, None

    def submit(self, candidate):
        self.candidate = candidate

    def wait(self, timeout):
        recipe = self.candidate.recipe
        value = 1 - sum((factor - 0.6) ** 2 for factor in recipe.scaling.values()) - 0.1 * (recipe.method != "ties")
        if 0.5 < recipe.scaling["a"] < 0.55:
            return [Outcome(self.candidate, error=ValueError(f"unlucky {recipe.identity}"))]
        time.sleep(0.005)
        with self.notes.open("a") as file:
            file.write(f"{recipe.identity}\n")
        return [Outcome(self.candidate, Measurement({"x": Score(value, 0.0, 1, "accuracy")}))]


def drive(directory, candidates, sampler):
    ledger = Ledger(str(directory / "ledger"), "demo")
    search(
        build_study(ledger, SPACE),
        SPACE,
        lambda number: make_sampler(sampler, 7, None, number),
        ledger,
        Serial(directory / "evaluated.txt"),
        make_objective("mean", ["x"]),
        Provenance("demo"),
        Budget(candidates),
        line_search=True,
    )


def main(directory, candidates, kills, seed, sampler):
    moments = random.Random(seed)
    done = hits = 0
    while True:
        process = os.fork()
        if process == 0:
            try:
                drive(directory, candidates, sampler)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        if done < kills:
            time.sleep(moments.uniform(0.02, 0.25))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        hits += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and done >= kills:
            if os.WEXITSTATUS(status):
                sys.exit(1)
            print(hits)
            return
        done += 1


if __name__ == "__main__":
    for name, kills in (("unbroken", 0), ("broken", int(sys.argv[3]))):
        path = Path(sys.argv[1]) / name
        path.mkdir(parents=True)
        main(path, int(sys.argv[2]), kills, int(sys.argv[4]), sys.argv[5])
