import os
import time
from collections import Counter
from datetime import UTC, datetime

import pytest

from merging.errors import ClusterError
from merging.evaluation.steps import Measurement
from merging.recipe import base_recipe
from ray_tasks.evaluators.evaluator import Answer, Assignment
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.lifecycle import EvaluatorGroup

CUDA = "CUDA error: an illegal memory access was encountered"


def evaluator_of(sick):
    """A class of actors that answer at once with an error where `sick(setup, answers, assignment)`, else slowly."""

    class Fake:
        def __init__(self, setup, threads):
            self.setup, self.answers = setup, 0
            try:
                os.close(os.open(setup, os.O_CREAT | os.O_EXCL))
                self.first = True
            except FileExistsError:
                self.first = False

        def build(self):
            return "built"

        def measure(self, assignment):
            who, now = f"{os.getpid()}", datetime.now(UTC)
            self.answers += 1
            if sick(self, assignment):
                return Answer(None, f"AcceleratorError: {CUDA}", who, now)
            time.sleep(0.1)
            return Answer(Measurement({}, 0.0, 0.1), None, who, now)

    return Fake


def measure(pool, count):
    done = []
    waiting = [Assignment(f"{number}", base_recipe(), "validation") for number in range(count)]
    deadline = time.monotonic() + 120
    try:
        pool.start()
        while len(done) < count and time.monotonic() < deadline:
            while waiting and pool.free:
                pool.submit(waiting.pop(0))
            done += pool.wait(1.0)
    finally:
        pool.close()
    return done


pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("local_ray")
def test_an_evaluator_with_a_broken_gpu_takes_no_candidate_with_it(tmp_path):
    kind = evaluator_of(lambda self, assignment: self.first and self.answers > 1)
    done = measure(EvaluatorPool(EvaluatorGroup(str(tmp_path / "flag"), 2, kind=kind)), 40)
    assert Counter(answer.error for answer in done) == {None: 40}


@pytest.mark.usefixtures("local_ray")
def test_a_candidate_that_breaks_every_evaluator_is_a_failed_row_and_the_others_go_on(tmp_path):
    said = []
    kind = evaluator_of(lambda self, assignment: assignment.ticket == "3")
    done = measure(EvaluatorPool(EvaluatorGroup(str(tmp_path / "flag"), 1, kind=kind, say=said.append)), 8)
    assert {answer.ticket for answer in done if answer.error} == {"3"}
    assert len(done) == 8
    # A slow machine may be told that no evaluator is at work yet; no place may be blamed.
    assert [line for line in said if not line.startswith("no evaluator is at work")] == []


@pytest.mark.usefixtures("local_ray")
def test_where_all_evaluators_are_broken_the_work_stops_before_the_budget_is_spent(tmp_path):
    kind = evaluator_of(lambda self, assignment: True)
    with pytest.raises(ClusterError, match=r"3 candidates in a row .* illegal memory access[^$]*--retry-failed"):
        measure(EvaluatorPool(EvaluatorGroup(str(tmp_path / "flag"), 2, kind=kind)), 40)


@pytest.mark.usefixtures("local_ray")
def test_a_place_that_fails_twice_where_others_do_not_is_given_up(tmp_path):
    """Whoever is not the first evaluator is sick, as where one of two GPUs is broken."""
    said = []
    kind = evaluator_of(lambda self, assignment: not self.first)
    pool = EvaluatorPool(EvaluatorGroup(str(tmp_path / "flag"), 2, kind=kind, say=said.append))
    pool.start()
    done, sent = [], 0
    deadline = time.monotonic() + 120
    while pool.group.evaluators == 2 and time.monotonic() < deadline:
        while pool.free:
            sent += 1
            pool.submit(Assignment(f"{sent}", base_recipe(), "validation"))
        done += pool.wait(1.0)
    pool.close()
    assert done
    assert not any(answer.error for answer in done)
    assert pool.group.evaluators == 1
    assert len(said) == 1
    assert "one evaluator less" in said[0]
    assert CUDA in said[0]
