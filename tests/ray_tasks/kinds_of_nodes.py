"""Evaluators on nodes of a kind: run by test_gpus.py in a process of its own, prints JSON. The GPUs are pretended."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import ray_tasks  # noqa: F401  settles the environment before Ray reads it

# isort: split
import ray
from ray.cluster_utils import Cluster

from merging.errors import ClusterError
from ray_tasks.connect import NodeKind, connect, device_each, require_nodes, room_for
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from ray_tasks.jobs.parallel import Workers

SPOT = NodeKind("H100", {"market": "spot"})


class Builder:
    """An evaluator that cannot be built on one node."""

    def __init__(self, sick, threads):
        self._sick = sick

    def build(self):
        if ray.get_runtime_context().get_node_id() == self._sick:
            raise OSError("no such device")
        return "built"


def refusal(*wanted):
    try:
        require_nodes(*wanted)
    except ClusterError as error:
        return str(error)
    return ""


def place(report):
    return ray.get_runtime_context().get_node_id(), len(ray.get_gpu_ids())


def places(kind):
    """Where a process for one device is started, and how many GPUs it has."""
    with Workers(lambda: 1, cpus=1, gpus=device_each(4.0), reserve=True, retries=0, nodes=kind) as workers:
        while not (free := workers.free(1)):
            workers.wait(1.0)
        workers.run(free[0], "call", place)
        while not (replies := workers.wait(1.0, fetch=True)):
            pass
        return replies[0].value


def main():
    found = {}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 4, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=4, num_gpus=4, resources={"accelerator_type:H100": 1}, labels={"market": "spot"})
    os.environ["RAY_ADDRESS"] = nodes.address
    with connect() as cluster:
        spot = [node["NodeID"] for node in ray.nodes() if SPOT.fits(node)]
        found["sizes"] = len(spot), cluster.now(SPOT).gpus, cluster.now().gpus
        found["room"] = [room_for(cluster.now(SPOT), 1, gpus, 1) for gpus in (4.0, 3.0, 2.0, 0.4)]
        other, labelled = NodeKind("A100"), NodeKind(None, {"a": "b"})
        wanted = [(SPOT, 4.0), (SPOT, 8.0), (other, 1.0), (labelled, 1.0), (SPOT, 4.0, 10**15)]
        found["refused"] = [refusal(*kind) for kind in wanted]
        node, devices = places(SPOT)
        found["statistics"] = node in spot, devices
        said = []
        group = EvaluatorGroup(spot[1], 4, gpus=2.0, kind=Builder, nodes=SPOT, say=said.append)
        pool = EvaluatorPool(group)
        pool.start(timeout=60.0, grace=20.0)
        found["built"] = sorted({spot.index(node) for node in group._nodes.values()}), pool.there
        found["said"] = said
        pool.close()
    nodes.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
