"""The Ray cluster that a program runs on: the one it is submitted to, the one it is told of, or its own."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.job_config import JobConfig

import merging
from merging.errors import ClusterError
from merging.io.memory import available_memory

WORKER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Workers read local files only, and leave the cores to the threads that they are given."""


PROGRAM = Path(merging.__file__).resolve().parents[1]
"""Where the program's packages lie: a checkout, or among what is installed."""

LOCAL = "local"
"""The address of a cluster that this process started for itself."""


@dataclass(frozen=True)
class Cluster:
    """What there is to work with.

    Args:
        address: Where it was joined, or `LOCAL`.
        nodes: Nodes that are alive.
        cpus: CPUs of all nodes.
        gpus: GPUs of all nodes.
        memory: Bytes of all nodes that tasks and actors may ask for; 0 where that is not known.
        sizes: CPUs and GPUs of each node; one node of everything where that is not known.
    """

    address: str
    nodes: int
    cpus: int
    gpus: float
    memory: int = 0
    sizes: tuple[tuple[float, float], ...] = ()

    def places(self, threads: int, gpus: float) -> int:
        """How many processes of so many CPUs and GPUs the nodes hold: none lies across two nodes, no share across two GPUs."""
        sizes = self.sizes or ((float(self.cpus), self.gpus),)
        return sum(_places(there, devices, threads, gpus) for there, devices in sizes)

    @property
    def may_grow(self) -> bool:
        """Whether nodes may join it."""
        return self.address != LOCAL

    def now(self) -> "Cluster":
        """What there is by now."""
        return describe_cluster(self.address)

    def describe(self) -> str:
        """One line for users."""
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"Ray {self.address}: {self.nodes} node{'s' * (self.nodes > 1)}, {self.cpus} CPUs{gpus}"


class Job(JobConfig):  # type: ignore[misc]  # Ray's class has no type
    """A job whose workers search the same modules as any Python on their node.

    Ray puts the driver's working directory first on its workers' path, so that a `search/` or `yaml.py` in it would be
    imported instead of ours. It does not where a job brings a directory of its own, and asks for that here.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return Path.cwd() != PROGRAM or bool(super()._runtime_env_has_working_dir())


@contextmanager
def connect() -> Iterator[Cluster]:
    """Joins the cluster that `RAY_ADDRESS` names, or starts a local one for the block.

    A local cluster is bound to loopback, asks for a token, and ends with the block. One that is running already in this
    process is used and left as it is.

    Raises:
        ClusterError: The cluster cannot be reached or refuses the token.
    """
    if ray.is_initialized():
        yield describe_cluster(ray.get_runtime_context().gcs_address)
        return
    chosen = os.environ.get("RAY_ADDRESS")
    environment = {"env_vars": WORKER_ENVIRONMENT}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if chosen:
            ray.init(
                address=chosen,
                job_config=Job(),
                runtime_env=environment,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        else:
            ray.init(
                address=LOCAL,
                job_config=Job(),
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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place, which exits without a word
    try:
        yield describe_cluster(ray.get_runtime_context().gcs_address if chosen else LOCAL)
    finally:
        ray.shutdown()


def evaluators_for(cluster: Cluster, asked: int | None, threads: int, gpus: float | None, bytes_each: int) -> int:
    """How many evaluators to start: as many as were asked for, or as the cluster holds.

    Args:
        cluster: What there is.
        asked: A number that a user set; where nodes may join, the cluster need not hold so many yet.
        threads: CPUs of an evaluator.
        gpus: GPUs of an evaluator; 0 for none.
        bytes_each: Estimated memory of an evaluator.

    Raises:
        ClusterError: Not one fits, or what was asked for does not.
    """
    if asked and cluster.may_grow:
        return asked
    limit = cluster.places(threads, gpus or 0.0)
    if limit < 1 and cluster.may_grow:
        raise ClusterError(
            f"no evaluator fits {cluster.describe()}: where nodes come as they are asked for, say how many evaluators are to "
            "ask for them with resources.evaluators, and for which GPUs with resources.gpus; else lower resources.threads "
            "or resources.gpus"
        )
    if limit < 1 or (asked or 0) > limit:
        what = f"{gpus:g} GPUs and {threads} CPUs" if gpus else f"{threads} CPUs"
        raise ClusterError(
            f"{asked or 1} evaluators of {what} do not fit {cluster.describe()}: lower resources.evaluators, "
            "resources.threads or resources.gpus"
        )
    return asked or room_for(cluster, threads, gpus or 0.0, bytes_each)


def gpus_each(asked: float | None) -> float:
    """GPUs of a process: what a user set, else one where the cluster has any."""
    return asked if asked is not None else float(bool(ray.cluster_resources().get("GPU")))


def room_for(cluster: Cluster, threads: int, gpus: float, bytes_each: int) -> int:
    """How many evaluators the cluster holds at once: as many as its GPUs, or cores and memory, allow."""
    room = cluster.places(threads, gpus)
    if not gpus and cluster.nodes == 1:
        room = min(room, int(available_memory() * 0.7 / max(bytes_each, 1)))
    elif not gpus and cluster.memory:
        room = min(room, cluster.memory // max(bytes_each, 1))
    return max(1, room)


def describe_cluster(address: str = LOCAL) -> Cluster:
    """What the cluster that this process has joined has now.

    Args:
        address: Where it was joined, or `LOCAL`.
    """
    resources = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    cpus, gpus, memory = (resources.get(name, 0.0) for name in ("CPU", "GPU", "memory"))
    found = [node["Resources"] for node in alive]
    sizes = tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in found)
    return Cluster(address, len(alive), int(cpus), float(gpus), int(memory), sizes)


def _places(cpus: float, gpus: float, threads: int, share: float) -> int:
    """How many processes a node holds."""
    by_cpu = int(cpus // threads)
    if not share:
        return by_cpu
    by_gpu = int(gpus / share + 1e-9) if share >= 1 else int(gpus) * int(1 / share + 1e-9)
    return min(by_cpu, by_gpu)
