import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.propagation import PropagationSettings, propagate
from merging.statistics import StatisticsFile
from merging.tasks import TextClassificationSettings
from ray_tasks.jobs.propagation import PropagationJob, solve
from ray_tasks.jobs.statistics import BoundTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def job(tiny_campaign, tmp_path):
    members = {name: member["checkpoint"] for name, member in tiny_campaign["members"].items()}
    tasks = {
        name: BoundTask(name, TextClassificationSettings(**tiny_campaign["tasks"][name]), path, tiny_campaign["base"])
        for name, path in members.items()
    }
    return PropagationJob(
        base=tiny_campaign["base"],
        members=members,
        heads=(),
        tasks=tasks,
        settings=PropagationSettings(examples=20, batch_size=6, ridge=0.1),
        key={"statistic": "propagated"},
        path=str(tmp_path / "propagated.safetensors"),
        checkpoint="c",
        data="d",
    )


def in_one_process(job):
    pool = Pool.open(job.base, job.members)
    return propagate(pool, {name: task.open() for name, task in job.tasks.items()}, list(job.members), job.settings)


def layers(fits):
    return [(fit.weights, fit.rows) for fit in fits]


def written(job):
    file = StatisticsFile.open(job.path)
    return {name: file.read(name) for name in file.names}


def test_sharded_equals_serial(job):
    reported = []
    fits = solve(job, processes=2, progress=reported.append)
    serial = in_one_process(job)
    assert layers(fits) == layers(serial.fits)
    torch.testing.assert_close(written(job), dict(serial.weights), rtol=0, atol=1e-4)
    assert reported == sorted(reported)
    assert reported[-1] == 1.0


def test_a_lost_actor_begins_the_work_again(job, kill_one):
    with kill_one("_MemberGroupActor"):
        fits = solve(job, processes=1, retries=1)
    serial = in_one_process(job)
    assert layers(fits) == layers(serial.fits)
    torch.testing.assert_close(written(job), dict(serial.weights), rtol=0, atol=1e-4)


def test_what_a_member_does_wrong_is_its_own_error(job):
    with pytest.raises(MethodError, match="factors: 'nobody' is no member"):
        solve(
            PropagationJob(**{**vars(job), "settings": PropagationSettings(factors={"nobody": 2.0})}),
            processes=1,
            retries=0,
        )
