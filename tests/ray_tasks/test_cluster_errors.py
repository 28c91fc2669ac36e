"""What a user reads where Ray lost a worker."""

import pytest
import ray

from merging.errors import ClusterError
from ray_tasks.cluster_errors import surfaced


def test_a_worker_killed_for_memory_is_an_error_with_its_remedy():
    killed = ray.exceptions.OutOfMemoryError(
        "1 worker(s) were killed: 22.8GB used / 23.5GB limit\nmore of Ray's advice"
    )
    with (
        pytest.raises(ClusterError, match=r"^running topic: 1 worker.*limit: set resources\.threads higher"),
        surfaced("running topic"),
    ):
        raise killed
