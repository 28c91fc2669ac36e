from dataclasses import replace

import pytest
import torch

from merging.errors import TaskError
from merging.evaluation.live_models import best_device
from merging.optimization import distillation
from merging.optimization.distillation_settings import DistillationSettings
from merging.recipe import Recipe
from merging.statistics import StatisticsFile
from merging.tasks import TextClassificationSettings
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.jobs.distillation import DistillationJob, distil
from ray_tasks.jobs.gradients import sources_with_logits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
SETTINGS = DistillationSettings(steps=5, batch=9, learning_rate=1e-3, evaluations=2, held_out=0.2, parts=3)


@pytest.fixture
def job(tiny_campaign, tmp_path):
    members = {name: member["checkpoint"] for name, member in tiny_campaign["members"].items()}
    tasks = {name: TextClassificationSettings(**tiny_campaign["tasks"][name]) for name in members}
    sources = {name: (settings, name) for name, settings in tasks.items()}
    owners = {name: name for name in members}
    setup = Setup(tiny_campaign["base"], members, (), {}, {}, tasks, owners, sources)
    start = Recipe("task_arithmetic", dict.fromkeys(members, 0.3))
    return DistillationJob(setup, start, SETTINGS, {"statistic": "distilled"}, str(tmp_path / "made"), "c", "d")


def written(job):
    file = StatisticsFile.open(job.path)
    return {name: file.read(name) for name in file.names}


def test_actors_come_to_the_weights_of_one_process(job, tmp_path):
    shares = []
    result = distil(job, workers=2, progress=shares.append)
    tasks, owners = sources_with_logits(job.setup)
    material = job.setup.material()
    cache = str(tmp_path / "own")
    alone = distillation.distil(material, tasks, owners, job.start, SETTINGS, best_device(), cache=cache)
    torch.testing.assert_close(written(job), dict(alone.weights), rtol=0, atol=1e-5)
    assert [look.step for look in result.looks] == [look.step for look in alone.looks] == [0, 3, 5]
    assert shares == sorted(shares)
    one = replace(job, path=str(tmp_path / "one"))
    distil(one, workers=1)
    torch.testing.assert_close(written(job), written(one), rtol=0, atol=0)


def test_a_lost_actor_costs_nothing_but_time(job, tmp_path, kill_one):
    with kill_one("_DistillationWorker"):
        distil(job, workers=2, retries=1)
    whole = replace(job, path=str(tmp_path / "whole"))
    distil(whole, workers=2)
    torch.testing.assert_close(written(job), written(whole), rtol=0, atol=0)
    assert not (tmp_path / "made.part").exists()


def test_what_is_wrong_is_its_own_error(job):
    weights = dict.fromkeys(job.setup.members, 0.0)
    with pytest.raises(TaskError, match="all are 0"):
        distil(replace(job, settings=SETTINGS.model_copy(update={"weights": weights})), workers=1, retries=0)
