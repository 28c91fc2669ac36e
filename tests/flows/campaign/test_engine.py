"""Campaigns in a real vLLM engine beside the same in transformers: `make test-vllm`."""

import os
import signal

import pytest
import yaml

from flows.campaign.open_campaign import open_campaign
from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.recipe import Recipe
from ray_tasks.evaluators.evaluator import Assignment
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from search.ledger.ledger import Ledger
from tests.merging.evaluation.engines.tiny_llama import task_settings, write_examples, write_pool

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-env, make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
ENGINE = {"kind": "vllm", "bucket": 1, "cache": 0.1}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Writes a campaign over tiny Llamas with tied heads, and opens it."""
    root = tmp_path_factory.mktemp("engines")
    paths = write_pool(root / "pool", tied=True)
    data = {
        split: write_examples(root / f"{split}.parquet", 12, seed) for seed, split in enumerate(("validation", "test"))
    }

    def make(name, **settings):
        result = {
            "name": name,
            "directory": str(root / name),
            "base": paths["base"],
            "members": {member: {"checkpoint": paths[member]} for member in ("one", "two")},
            "tasks": task_settings(data),
            "task_heads": dict.fromkeys(task_settings(data), "one"),
            "selection": {"mode": "all"},
            "search": {
                "methods": ["average", "ties"],
                "candidates": 5,
                "sampler": "random",
                "pruning": "none",
            },
            "resources": {"evaluators": 1},
            **settings,
        }
        file = root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(result))
        return load_campaign(str(file))

    return make


def scores(campaign):
    run(campaign, Display())
    rows = Ledger(f"{campaign.directory}/ledger").rows()
    assert {row.status for row in rows} == {"complete"}
    return {(row.candidate, row.split, task): score for row in rows for task, score in row.scores.items()}


def test_a_campaign_gives_the_same_scores_in_either_engine_resident_and_sharded(campaign):
    expected = scores(campaign("transformers"))
    two = {"evaluators": 2, "regime": "resident"}
    for name, resources in (("resident", two), ("sharded", {"evaluators": 1, "regime": "sharded", "shards": 2})):
        result = scores(campaign(name, engine=ENGINE, resources=resources))
        assert result.keys() == expected.keys()
        for key, score in expected.items():
            assert result[key] == pytest.approx(score, rel=1e-4, abs=1e-4), (name, key)


def test_a_killed_engine_is_a_lost_evaluator_and_the_candidate_is_measured_elsewhere(campaign):
    import ray

    opened = open_campaign(campaign("killed", engine=ENGINE), Display())
    pool = EvaluatorPool(EvaluatorGroup(opened.setup({}), evaluators=1))
    recipe = Recipe("ties", {"one": 0.5, "two": 0.7})

    def measured(ticket):
        pool.submit(Assignment(ticket, recipe, "validation"))
        while not (answers := pool.wait(5.0)):
            pass
        return answers[0]

    pool.start()
    try:
        before = measured("before")
        (actor,) = pool._queues
        os.kill(ray.get(actor.__ray_call__.remote(lambda evaluator: os.getpid())), signal.SIGKILL)
        lost = measured("lost")
        assert lost.lost
        while not pool.there:
            pool.wait(5.0)
        after = measured("after")
        assert {name: score.value for name, score in after.measurement.scores.items()} == {
            name: score.value for name, score in before.measurement.scores.items()
        }
    finally:
        pool.close()
