"""Loses the only node with sums of a statistic, when another has come; run by test_statistics.py, prints JSON.

A process of its own, for the tests' process may be at work on another cluster.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
os.environ |= {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
os.environ |= {"RAY_max_direct_call_object_size": "1000"}  # small sums lie on nodes, too, and not with the driver

import ray_tasks  # noqa: F401  settles the environment before Ray reads it

# isort: split
from ray.cluster_utils import Cluster

from merging.statistics import LikelihoodSettings
from merging.tasks import TextClassificationSettings
from ray_tasks.connect import connect
from ray_tasks.jobs.statistics import BoundTask, Job, compute


def main():
    scratch, checkpoint, settings, path = sys.argv[1:]
    bound = BoundTask("two", TextClassificationSettings(**json.loads(settings)), checkpoint)
    fisher = LikelihoodSettings(examples=20, batch_size=1)
    job = Job("two", "fisher", fisher, bound, bound, "train", 20, path, {"checkpoint": "c", "data": "d"})
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": scratch}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    first = nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    seen = []

    def progress(job, examples):
        seen.append(examples)
        if len(seen) == 4:
            nodes.add_node(num_cpus=1)
            nodes.remove_node(first, allow_graceful=False)

    with connect():
        compute([job], shard=2, threads=1, gpus=0.0, retries=1, progress=progress)
    nodes.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
