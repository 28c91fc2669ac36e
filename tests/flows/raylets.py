"""A cluster of real raylets with one CPU each; run by test_faults.py and told what to do on its standard input.

`lose` kills the newest raylet and all below it, `add` starts another, the end of the input ends the cluster.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
os.environ |= {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_timeout_ms": "2000"}

import ray_tasks  # noqa: F401  settles the environment before Ray reads it

# isort: split
from ray.cluster_utils import Cluster


def main():
    scratch, count = sys.argv[1], int(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "temp_dir": scratch})
    nodes = [cluster.add_node() for _ in range(count - 1)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "lose":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            nodes.append(cluster.add_node())
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
