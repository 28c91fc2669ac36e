"""The sharded regime gives the resident regime's weights bit for bit, whatever is lost, and however they travel."""

import math
import os
import re
import signal
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import LiveModels
from merging.evaluation.steps import EvaluationPlan
from merging.mergers.material import subset_fingerprint
from merging.mergers.resident import ResidentMerger
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors
from merging.tasks import TextClassificationSettings, make_task
from ray_tasks.evaluators.evaluator import Assignment, Setup
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.fed_evaluator import Delivery, FedEvaluator
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from ray_tasks.sharded.nixl_transfer import ReceiveBuffers
from ray_tasks.sharded.placement import nodes, plan, sharded
from ray_tasks.sharded.shards import Receiver

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
DIRECT = pytest.param(True, id="nixl", marks=pytest.mark.skipif(not find_spec("nixl"), reason="needs mergequest[nixl]"))
MEMBERS = ("one", "two", "three")
ALL = {"one": 0.7, "two": 0.5, "three": 0.9}
GROUPED = {"one@layers:0": 0.4, "one@layers:1-": 0.9, "two": 0.5, "three@*query*": 0.2, "three@*": 0.8}
RECIPES = [
    base_recipe(),
    member_recipe("two"),
    Recipe("average", dict.fromkeys(MEMBERS, 1.0)),
    Recipe("task_arithmetic", GROUPED),
    Recipe("ties", ALL, {"density": 0.2}),
    Recipe("ties", GROUPED, {"density": 0.35}),
    Recipe("lines+ties", ALL, {"density": 0.2}),
    Recipe("dare", ALL, {"drop": 0.4, "seed": 3}),
    Recipe("fisher", ALL),
    Recipe("regmean", ALL),
    Recipe("regmean", GROUPED),
    Recipe("multi_slerp", ALL),
    Recipe("regmean_propagated", dict.fromkeys(MEMBERS, 1.0), {"factor": 0.9}),
]


@pytest.fixture(scope="module")
def setup(tiny_campaign, tiny_pool, tmp_path_factory):
    """The tiny pool with statistics; query, key and value share their Grams."""
    root = tmp_path_factory.mktemp("statistics")
    generator = torch.Generator().manual_seed(0)
    members = {name: str(tiny_pool[name]) for name in MEMBERS}
    pool = Pool.open(str(tiny_pool["base"]), members)

    def save(kind, who, tensors, checkpoint, shared=None):
        about = Partial({}, {"examples": 8, "tokens": 8}, shared=shared or {})
        path = str(root / f"{who}.{kind}.safetensors")
        save_tensors(path, kind, {}, tensors, about, checkpoint=checkpoint, data="")
        return path

    def gram(size):
        value = torch.randn(2 * size, size, generator=generator)
        return value.T @ value

    files = {}
    for who, member in pool.members.items():
        shapes = {member.names[name]: tuple(info.shape) for name, info in pool.weights.items()}
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name}
        shared = {name: re.sub("key|value", "query", name) for name in matrices if re.search("key|value", name)}
        fisher = {name: torch.rand(shape, generator=generator) * 1e-3 for name, shape in shapes.items()}
        grams = {name: gram(shape[1]) for name, shape in matrices.items() if name not in shared}
        own = member.checkpoint.fingerprint
        files[who] = (save("fisher", who, fisher, own), save("gram", who, grams, own, shared))
    solved = {name: torch.randn(tuple(info.shape), generator=generator) for name, info in pool.weights.items()}
    subset = "+".join(sorted(MEMBERS))
    files[subset] = (save("propagated", subset, solved, subset_fingerprint(pool, MEMBERS)),)
    return Setup(
        base=str(tiny_pool["base"]),
        members=members,
        heads=(),
        statistics=files,
        examples={},
        tasks={name: TextClassificationSettings(**task) for name, task in tiny_campaign["tasks"].items()},
        owners={name: name for name in MEMBERS},
    )


@pytest.fixture(scope="module", params=[pytest.param(False, id="store"), DIRECT])
def shards(setup, request):
    made = plan(setup.material(), ["ties", "regmean"], nodes(), evaluators=1, shards=2, direct=request.param)
    with sharded(setup.material, made, retries=1) as running:
        yield running


def empty(pool):
    return {name: torch.full(tuple(info.shape), math.nan) for name, info in pool.weights.items()}


def deliver(material, pieces, buffers=None):
    """What an evaluator copies into its models."""
    out = empty(material.pool)
    assert [piece.error for piece in pieces] == [None] * len(pieces)
    assert all(len(piece.values) == 0 for piece in pieces) == bool(buffers)
    delivery = Delivery(material, out, buffers)
    delivery.take(pieces)
    return out, delivery.merge(base_recipe())


def arrived(references):
    import ray  # after ray_tasks, which settles its environment

    return ray.get(references, timeout=120)


def test_shards_merge_bit_for_bit_what_one_process_merges(setup, shards):
    material = setup.material()
    expected = empty(material.pool)
    merger = ResidentMerger(material, expected)
    buffers = ReceiveBuffers(shards.parts) if shards.parts else None
    receiver = Receiver(buffers.address) if buffers else None
    for recipe in RECIPES:
        report = merger.merge(recipe)
        out, result = deliver(material, arrived(shards.merge(recipe, receiver)), buffers)
        assert result == report
        for name, value in expected.items():
            assert torch.equal(out[name], value), (recipe, name)


@pytest.fixture(scope="module")
def running(setup, shards):
    """A pool of one evaluator, which takes seconds to begin: who is killed in one test is replaced for the next."""
    pool = EvaluatorPool(
        EvaluatorGroup(replace(setup, parts=shards.parts), evaluators=1, kind=FedEvaluator), shards=shards
    )
    pool.start()
    yield pool
    pool.close()


@pytest.fixture
def pool(running):
    """The pool when its evaluator is there and has nothing to do."""
    until_free(running)
    assert (running.there, running.capacity, running.free) == (1, 2, 2)
    return running


@pytest.fixture
def through_the_store(shards):
    if shards.parts:
        pytest.skip("what an evaluator does by itself does not depend on how weights reach it")


def test_evaluators_are_fed_and_every_lost_shard_costs_one_more_try(setup, shards, pool, collect):
    ties, regmean = RECIPES[4], RECIPES[9]
    tasks = [make_task(name, settings, setup.members[name]) for name, settings in setup.tasks.items()]
    live = LiveModels(setup.material(), tasks, setup.owners, torch.device("cpu"))
    expected = {name: live.measure(recipe, "validation") for name, recipe in (("ties", ties), ("regmean", regmean))}

    def agree(done, name):
        assert done.error is None
        wanted = expected[name].scores
        assert {task: (s.value, s.loss) for task, s in done.measurement.scores.items()} == {
            task: (s.value, s.loss) for task, s in wanted.items()
        }
        assert done.measurement.report == expected[name].report

    # the second one's weights are merged while the first is measured
    assert (pool.capacity, pool.free) == (2, 2)
    pool.submit(Assignment("ties", ties, "validation"))
    pool.submit(Assignment("regmean", regmean, "validation"))
    assert pool.free == 0
    for name, done in collect(pool, 2).items():
        agree(done, name)

    pool.submit(Assignment("bad", Recipe("fisher", {"one": 1.0, "two": -1.0, "three": -1.0}), "validation"))
    bad = collect(pool, 1)["bad"]
    assert (bad.lost, bad.error.split(":")[0]) == (False, "MethodError")

    for _ in range(2):  # however often
        os.kill(arrived(shards.actors[1].__ray_call__.remote(lambda shard: os.getpid())), signal.SIGKILL)
        pool.submit(Assignment("first", ties, "validation"))
        first = collect(pool, 1)["first"]
        assert (first.lost, first.error) == (True, "a shard was started again")
        pool.submit(Assignment("again", ties, "validation"))
        agree(collect(pool, 1)["again"], "ties")


@pytest.mark.usefixtures("through_the_store")
def test_an_evaluator_that_is_given_up_does_not_take_its_next_assignment_with_it(pool, collect):
    pool.seconds = 2.0
    slow = EvaluationPlan(8, lambda trace: bool(time.sleep(600)))
    pool.submit(Assignment("slow", base_recipe(), "validation", plan=slow))
    pool.submit(Assignment("next", base_recipe(), "validation"))
    assert collect(pool, 1)["slow"].error == "TimeoutError: not measured within 2 s (search.candidate_seconds)"
    pool.seconds = None
    assert collect(pool, 1)["next"].measurement is not None


@pytest.mark.usefixtures("through_the_store")
def test_a_killed_evaluator_costs_one_more_try(pool, collect):
    recipe = RECIPES[3]
    pool.submit(Assignment("before", recipe, "validation"))
    before = collect(pool, 1)["before"]
    assert before.error is None
    (actor,) = pool._queues
    os.kill(arrived(actor.__ray_call__.remote(lambda evaluator: os.getpid())), signal.SIGKILL)
    pool.submit(Assignment("first", recipe, "validation"))
    assert collect(pool, 1)["first"].lost
    again = resubmit(pool, Assignment("again", recipe, "validation"), collect)
    assert again.error is None
    for task, score in before.measurement.scores.items():
        assert (again.measurement.scores[task].value, again.measurement.scores[task].loss) == (score.value, score.loss)


def test_an_evaluator_that_shards_cannot_write_to_is_replaced(shards, pool, collect):
    """The one that comes instead is fed."""
    if not shards.parts:
        pytest.skip("through the store, whoever is alive is reached")
    recipe = RECIPES[3]
    pool.submit(Assignment("before", recipe, "validation"))
    before = collect(pool, 1)["before"]
    (actor,) = pool._queues
    cut = replace(arrived(actor.address.remote()), agent=b"nowhere", name="nobody")
    pool._receivers[actor] = Receiver(cut)
    pool.submit(Assignment("first", base_recipe(), "validation"))
    first = collect(pool, 1)["first"]
    assert first.lost
    assert "a shard cannot write to this evaluator" in first.error
    assert actor not in pool._queues
    again = resubmit(pool, Assignment("again", recipe, "validation"), collect)
    assert {task: (score.value, score.loss) for task, score in again.measurement.scores.items()} == {
        task: (score.value, score.loss) for task, score in before.measurement.scores.items()
    }


def until_free(pool):
    deadline = time.monotonic() + 240
    while (pool.at_work or not pool.free) and time.monotonic() < deadline:
        pool.wait(1.0)


def resubmit(pool, assignment, collect):
    until_free(pool)
    pool.submit(assignment)
    return collect(pool, 1)[assignment.ticket]
