import os
import signal
import time

import pytest
import torch

from merging.errors import ClusterError, PoolError
from merging.evaluation.live_models import LiveModels
from merging.evaluation.steps import EvaluationPlan
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.tasks import TextClassificationSettings, make_task
from ray_tasks.evaluators.evaluator import Assignment, Setup
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.lifecycle import EvaluatorGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def setup(tiny_campaign):
    return Setup(
        base=tiny_campaign["base"],
        members={name: member["checkpoint"] for name, member in tiny_campaign["members"].items()},
        heads=(),
        statistics={},
        examples={},
        tasks={name: TextClassificationSettings(**task) for name, task in tiny_campaign["tasks"].items()},
        owners={name: name for name in tiny_campaign["tasks"]},
    )


def test_what_takes_too_long_has_failed_and_its_evaluator_is_replaced(setup, collect):
    pool = EvaluatorPool(EvaluatorGroup(setup, evaluators=1, restarts=0), seconds=2.0)
    pool.start()
    try:
        pool.submit(
            Assignment("slow", base_recipe(), "validation", plan=EvaluationPlan(8, lambda trace: bool(time.sleep(600))))
        )
        slow = collect(pool, 1)["slow"]
        assert slow.error == "TimeoutError: not measured within 2 s (search.candidate_seconds)"
        assert not slow.lost
        deadline = time.monotonic() + 120
        while not pool.free and time.monotonic() < deadline:
            assert pool.wait(1.0) == []
        assert pool.capacity == 1
        pool.seconds = 60.0
        pool.submit(Assignment("quick", base_recipe(), "validation"))
        assert collect(pool, 1)["quick"].measurement is not None
    finally:
        pool.close()


def test_a_setup_that_cannot_be_built_says_why(setup, tmp_path, save_base):
    other = save_base(tmp_path / "other", intermediate_size=64)
    pool = EvaluatorPool(EvaluatorGroup(Setup(**{**vars(setup), "base": str(other)}), evaluators=1))
    try:
        with pytest.raises(PoolError, match="do not fit together"):
            pool.start()
    finally:
        pool.close()


@pytest.fixture(scope="module")
def pool(setup):
    """Two evaluators that take seconds to begin: tests with pools of their own come before, who kills one comes last."""
    pool = EvaluatorPool(EvaluatorGroup(setup, evaluators=2))
    pool.start()
    yield pool
    pool.close()


def test_evaluators_measure_what_this_process_measures(pool, setup, collect):
    recipe = Recipe("task_arithmetic", {"one": 0.4, "three": 0.8})
    pool.submit(Assignment("merge", recipe, "validation"))
    pool.submit(Assignment("base", base_recipe(), "test", limit=5))
    result = collect(pool, 2)
    tasks = [make_task(name, settings, setup.members[name]) for name, settings in setup.tasks.items()]
    live = LiveModels(setup.material(), tasks, setup.owners, torch.device("cpu"))
    expected = live.measure(recipe, "validation")
    for name, score in result["merge"].measurement.scores.items():
        assert (score.value, score.loss) == (expected.scores[name].value, expected.scores[name].loss)
    assert {score.examples for score in result["base"].measurement.scores.values()} == {5}
    assert result["merge"].worker != result["base"].worker


def test_a_failing_recipe_is_an_answer(pool, collect):
    pool.submit(Assignment("bad", Recipe("task_arithmetic", {"nobody": 1.0}), "validation"))
    pool.submit(Assignment("good", member_recipe("one"), "validation"))
    result = collect(pool, 2)
    assert result["bad"].error.startswith("MethodError: 'nobody' is no member of the pool")
    assert not result["bad"].lost
    assert result["good"].measurement is not None


def test_a_gate_decides_in_the_evaluator(pool, setup, collect):
    limit = 16
    pool.submit(
        Assignment("some", base_recipe(), "validation", plan=EvaluationPlan(8, lambda trace: trace.examples >= limit))
    )
    pool.submit(Assignment("all", base_recipe(), "validation", plan=EvaluationPlan(8)))
    result = collect(pool, 2)
    assert result["some"].measurement.pruned
    assert {score.examples for score in result["some"].measurement.scores.values()} == {16}
    whole, some = result["all"].measurement.trace, result["some"].measurement.trace
    assert all(whole.values[task][:16].tolist() == some.values[task].tolist() for task in setup.tasks)


def test_a_killed_evaluator_is_lost_and_replaced(pool, collect):
    victim = int(collect_one(pool, collect).worker.split(":")[1])
    pool.submit(Assignment("first", base_recipe(), "validation"))
    pool.submit(Assignment("second", base_recipe(), "validation"))
    os.kill(victim, signal.SIGKILL)
    result = collect(pool, 2)
    lost = [done for done in result.values() if done.lost]
    assert len(result) == 2
    assert len(lost) <= 1
    deadline = time.monotonic() + 120
    while pool.there < 2 and time.monotonic() < deadline:
        assert pool.wait(1.0) == []
    assert pool.there == 2
    for ticket in ("third", "fourth", "fifth", "sixth"):
        pool.submit(Assignment(ticket, base_recipe(), "validation"))
    with pytest.raises(ClusterError, match="every evaluator is busy"):
        pool.submit(Assignment("seventh", base_recipe(), "validation"))
    remaining = collect(pool, 4)
    assert len(remaining) == 4
    assert all(done.measurement is not None or done.lost for done in remaining.values())


def collect_one(pool, collect):
    pool.submit(Assignment("probe", base_recipe(), "validation"))
    return collect(pool, 1)["probe"]
