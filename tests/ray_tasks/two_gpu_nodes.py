"""What is asked of a cluster with GPUs: run by test_gpus.py in a process of its own, prints JSON. The GPUs are pretended."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import ray_tasks  # noqa: F401  settles the environment before Ray reads it

# isort: split
import ray
from ray.cluster_utils import Cluster

from ray_tasks.connect import connect, evaluators_for, gpus_each
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from ray_tasks.jobs.parallel import each


class Idle:
    def __init__(self, setup, threads):
        pass

    def build(self):
        return "built"


def devices(report):
    time.sleep(2)
    return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()


def main():
    result = {}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=4, num_gpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    with connect() as cluster:
        result["default"] = gpus_each(None), gpus_each(0.5), gpus_each(0.0)
        result["first order"] = [*dict(each(devices, dict.fromkeys("abc", ()))).values()]
        result["sharing"] = [gpus for _, gpus in dict(each(devices, {"a": ()}, gpus=0.0)).values()]
        count = evaluators_for(cluster, None, 1, 0.4, 1)
        pool = EvaluatorPool(EvaluatorGroup(None, count, gpus=0.4, kind=Idle))
        result["evaluators"] = count, pool.start(timeout=60.0, grace=30.0)
        pool.close()
        said = []
        group = EvaluatorGroup(None, 2, gpus=1.0, kind=Idle, say=said.append)
        (sick,) = (node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU") == 1)
        group.blame(sick, "CUDA error: x")
        result["after one"] = list(said)
        group.blame(sick, "CUDA error: y")
        result["after two"] = said
        pool = EvaluatorPool(group)
        pool.start(timeout=60.0)
        result["on the sick node"] = sum(node == sick for node in group._nodes.values()), pool.there
        pool.close()
    nodes.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
