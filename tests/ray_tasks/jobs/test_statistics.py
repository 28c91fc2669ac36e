from dataclasses import replace

import pytest
import torch

from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import StatisticsError
from merging.statistics import (
    STATISTICS,
    LikelihoodSettings,
    RepresentationSettings,
    StatisticSettings,
    StatisticsFile,
    measure,
)
from merging.tasks import TextClassificationSettings
from ray_tasks.jobs.statistics import BoundTask, Job, compute

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
SETTINGS = {
    "fisher": LikelihoodSettings(examples=20, batch_size=4),
    "gram": StatisticSettings(examples=20, batch_size=4),
    "representation": RepresentationSettings(examples=20, batch_size=4),
}


@pytest.fixture
def make_job(tiny_campaign, tmp_path):
    def make(kind, settings=None):
        checkpoint = tiny_campaign["members"]["two"]["checkpoint"]
        bound = BoundTask("two", TextClassificationSettings(**tiny_campaign["tasks"]["two"]), checkpoint)
        return Job(
            member="two",
            kind=kind,
            settings=settings or SETTINGS[kind],
            data=bound,
            model=bound,
            split="train",
            examples=20,
            path=str(tmp_path / f"{kind}.safetensors"),
            fingerprints={"checkpoint": Checkpoint.open(checkpoint).fingerprint, "data": "d"},
        )

    return make


def run(jobs, **changes):
    seen = []
    options = {"shard": 6, "threads": 1, "gpus": 0.0, "retries": 2} | changes
    compute(jobs, **options, progress=lambda job, examples: seen.append((job.kind, examples)))
    return seen


def test_sharded_equals_serial_for_every_kind(make_job):
    jobs = [make_job(kind) for kind in SETTINGS]
    seen = run(jobs)
    for job in jobs:
        assert sorted(n for kind, n in seen if kind == job.kind) == [2, 6, 6, 6]
        file = StatisticsFile.open(job.path)
        statistic = STATISTICS[job.kind](job.settings)
        task = job.data.open()
        expected = statistic.finalize(measure(task, statistic))
        # what is 0 but for rounding (the Fisher of a key's bias) is compared with the largest entry of all
        rounding = 1e-7 * max(float(value.abs().max()) for value in expected.values())
        for name, value in expected.items():
            torch.testing.assert_close(file.read(name), value, rtol=1e-5, atol=rounding)
        file.check(Checkpoint.open(job.data.head).fingerprint)


def test_a_failing_shard_is_its_own_error(make_job):
    job = make_job("fisher")
    without = replace(job.data, settings=job.data.settings.model_copy(update={"data": {}}))
    bad = replace(job, split="test", data=without, model=without)
    with pytest.raises(Exception, match=r"names no test split|no test examples"):
        run([bad])


def test_a_lost_worker_costs_its_shard_only(make_job, kill_one):
    job = make_job("fisher", LikelihoodSettings(examples=20, batch_size=1))
    with kill_one("_Process.run"):
        run([job], shard=2)
    assert StatisticsFile.open(job.path).examples == 20


def test_wrong_statistics_raise_their_own_type(make_job, tiny_campaign):
    with pytest.raises(StatisticsError):
        StatisticsFile.open(tiny_campaign["base"] + "/model.safetensors")
