"""Loses every node with an evaluator while it measures, waits, and goes on with nodes that come; run by test_losses.py.

A process of its own, for the tests' process may be at work on another cluster.
"""

import os
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
os.environ |= {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_timeout_ms": "2000"}

import ray_tasks  # noqa: F401  settles the environment before Ray reads it

# isort: split
from ray.cluster_utils import Cluster as Nodes

from ray_tasks.connect import connect, room_for
from ray_tasks.evaluators import lifecycle
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool


class Sleeper:
    def __init__(self, setup, threads):
        pass

    def build(self):
        pass

    def measure(self, assignment):
        time.sleep(1.0)
        return SimpleNamespace(
            measurement=None,
            error="measured",
            worker="",
            started=None,
            seconds=0.0,
            lost=False,
            unreachable=False,
            fault=False,
        )


def main():
    lifecycle.SILENCE, lifecycle.LOOK = 1.0, 0.3
    nodes = Nodes(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": sys.argv[1]}
    )
    places = [nodes.add_node(num_cpus=1)]
    os.environ["RAY_ADDRESS"] = nodes.address
    answers, lost, waited = set(), 0, []

    def say(text):
        print(text, flush=True)
        if "waiting for room" in text:
            waited.append(text)

    with connect() as cluster:
        pool = EvaluatorPool(
            lifecycle.EvaluatorGroup(
                None, 1, threads=1, restarts=0, room=lambda: room_for(cluster.now(), 1, 0.0, 1), say=say, kind=Sleeper
            )
        )
        pool.start()
        queue = deque(str(number) for number in range(12))

        waited.clear()
        begun = time.monotonic()
        while len(answers) + lost < 12 and time.monotonic() < begun + 120:
            if places and time.monotonic() > begun + 1.5:
                nodes.remove_node(places.pop(), allow_graceful=False)
                waited.clear()
            if waited and not places:  # for new nodes
                waited.clear()
                for _ in range(2):
                    nodes.add_node(num_cpus=1)
            while queue and pool.free:
                pool.submit(SimpleNamespace(ticket=queue[0], candidate=queue.popleft()))
            for done in pool.wait(0.5):
                lost += done.lost
                answers.add(done.ticket)
        print(f"answers {len(answers)} of 12, lost {lost}", flush=True)
        pool.close()
    nodes.shutdown()


if __name__ == "__main__":
    main()
