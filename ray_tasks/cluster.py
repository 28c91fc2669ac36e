"""The Ray cluster that a program runs on: the one it is submitted to, the one it is told of, or its own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import ray

from merging.errors import ClusterError

WORKER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Workers read local files only, and leave the cores to the threads that they are given."""


@dataclass(frozen=True)
class Cluster:
    """What there is to work with.

    Args:
        address: Where it was joined, or `local`.
        nodes: Nodes that are alive.
        cpus: CPUs of all nodes.
        gpus: GPUs of all nodes.
    """

    address: str
    nodes: int
    cpus: int
    gpus: float

    def describe(self) -> str:
        """One line for users."""
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"Ray {self.address}: {self.nodes} node{'s' * (self.nodes > 1)}, {self.cpus} CPUs{gpus}"


@contextmanager
def connect() -> Iterator[Cluster]:
    """Joins the cluster that `RAY_ADDRESS` names, or starts a local one for the block.

    A local cluster is bound to loopback, asks for a token, and ends with the block. One that is running already in this
    process is used and left as it is.

    Raises:
        ClusterError: The cluster cannot be reached or refuses the token.
    """
    if ray.is_initialized():
        yield _describe(ray.get_runtime_context().gcs_address)
        return
    chosen = os.environ.get("RAY_ADDRESS")
    environment = {"env_vars": WORKER_ENVIRONMENT}
    try:
        if chosen:
            ray.init(address=chosen, runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                address="local",
                runtime_env=environment,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        remedy = (
            "is it running, and does RAY_AUTH_TOKEN hold its token?" if chosen else "see the Ray log under /tmp/ray"
        )
        raise ClusterError(
            f"cannot {'join ' + chosen if chosen else 'start a local Ray'}: {error}\n{remedy}"
        ) from error
    try:
        yield _describe(ray.get_runtime_context().gcs_address if chosen else "local")
    finally:
        ray.shutdown()


def evaluators_for(cluster: Cluster, asked: int | None, threads: int, gpus: float | None, bytes_each: int) -> int:
    """How many evaluators the cluster holds at once: as many as its GPUs, or cores and memory, allow.

    Args:
        cluster: What there is.
        asked: A number that a user set.
        threads: CPUs of an evaluator.
        gpus: GPUs of an evaluator; 0 for none.
        bytes_each: Estimated memory of an evaluator.

    Raises:
        ClusterError: Not one fits, or what was asked for does not.
    """
    room = int(cluster.gpus / gpus) if gpus else cluster.cpus // threads
    if not gpus and cluster.nodes == 1:
        room = min(room, max(1, int(psutil.virtual_memory().available * 0.7 / max(bytes_each, 1))))
    limit = int(cluster.gpus / gpus) if gpus else cluster.cpus // threads
    if limit < 1 or (asked or 0) > limit:
        what = f"{gpus:g} GPUs" if gpus else f"{threads} CPUs"
        raise ClusterError(
            f"{asked or 1} evaluators of {what} do not fit {cluster.describe()}: lower resources.evaluators, "
            "resources.threads or resources.gpus"
        )
    return asked or max(1, room)


def _describe(address: str) -> Cluster:
    resources = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(address, len(alive), int(resources.get("CPU", 0)), float(resources.get("GPU", 0.0)))
