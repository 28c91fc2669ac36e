import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch

from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import StatisticsError
from merging.statistics import (
    STATISTICS,
    LikelihoodSettings,
    Partial,
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

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


@dataclass(frozen=True)
class CountedTask(BoundTask):
    loads: str = ""

    def open(self):
        task = super().open()
        load = task.load_model

        def counted():
            with Path(self.loads).open("a") as file:
                file.write("loaded\n")
            return load()

        task.load_model = counted
        return task


@dataclass(frozen=True)
class InSmallBlocks(CountedTask):
    def open(self):
        from merging.statistics import statistics_file
        from ray_tasks.jobs import statistics

        statistics_file.BLOCK_BYTES = statistics.BLOCK_BYTES = 1 << 12
        place = Path(self.loads + ".processes")
        place.mkdir(exist_ok=True)
        (place / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(place.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)  # so that two processes share the work
        return super().open()


@dataclass(frozen=True)
class DoomedTask(InSmallBlocks):
    def open(self):
        try:
            Path(self.loads + ".doomed").touch(exist_ok=False)
            Partial.block = lambda *arguments: os._exit(1)  # the first process, once it is asked for its part
        except FileExistsError:
            pass
        return super().open()


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


def assert_serial(job, batches):
    """The file holds what one process measures, but for the order of float32 sums."""
    file, task, statistic = StatisticsFile.open(job.path), job.data.open(), STATISTICS[job.kind](job.settings)
    assert file.examples == 20
    for name, value in statistic.finalize(measure(task, statistic)).items():
        scale = value if job.kind == "fisher" else torch.outer(value.diagonal(), value.diagonal()).sqrt()
        assert ((file.read(name) - value).abs() <= 2 * batches * 2**-24 * scale).all(), name


def test_a_lost_worker_costs_the_shards_of_its_sum(make_job, kill_one):
    job = make_job("fisher", LikelihoodSettings(examples=20, batch_size=2))
    with kill_one("_Process.run"):
        seen = run([job], shard=2)
    assert sum(examples for _, examples in seen) == 20
    assert_serial(job, 10)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
@pytest.mark.parametrize("task", [InSmallBlocks, DoomedTask])
def test_parts_of_several_processes_are_summed_block_by_block(make_job, tmp_path, kind, task):
    """`DoomedTask`: one of them dies while they are."""
    settings = {"fisher": LikelihoodSettings, "gram": StatisticSettings}[kind](examples=20, batch_size=2)
    job = make_job(kind, settings)
    bound = task(**vars(job.data), loads=str(tmp_path / "loads"))
    seen = run([replace(job, data=bound, model=bound)], shard=2)
    assert len(Path(bound.loads).read_text().splitlines()) >= 2
    assert sum(examples for _, examples in seen) == 20
    assert (min(examples for _, examples in seen) < 0) == (task is DoomedTask)
    assert_serial(job, 10)


def test_a_lost_node_costs_the_shards_whose_sum_lay_there(make_job, tiny_campaign, tmp_path):
    job = make_job("fisher", LikelihoodSettings(examples=20, batch_size=1))
    script, settings = Path(__file__).with_name("lose_a_node.py"), json.dumps(tiny_campaign["tasks"]["two"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="mq", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        done = subprocess.run(
            [sys.executable, script, scratch, job.data.head, settings, job.path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen[:4], sum(seen), min(seen)) == ([2, 2, 2, 2], 20, -8)
    task, statistic = job.data.open(), STATISTICS["fisher"](job.settings)
    file = StatisticsFile.open(job.path)
    for name, value in statistic.finalize(measure(task, statistic)).items():
        torch.testing.assert_close(file.read(name), value, rtol=1e-5, atol=1e-9)


def test_a_process_keeps_its_model_from_shard_to_shard_and_statistic_to_statistic(make_job, tmp_path):
    """Loads leave a line each in a file."""
    loads = tmp_path / "loads"
    jobs = [make_job(kind) for kind in SETTINGS]
    bound = CountedTask(**vars(jobs[0].data), loads=str(loads))
    run([replace(job, data=bound, model=bound) for job in jobs], shard=2)
    assert len(loads.read_text().splitlines()) <= int(ray.cluster_resources()["CPU"])


def test_wrong_statistics_raise_their_own_type(make_job, tiny_campaign):
    with pytest.raises(StatisticsError):
        StatisticsFile.open(tiny_campaign["base"] + "/model.safetensors")
