"""The Ray cluster that a program runs on: the one it is submitted to, the one it is told of, or its own."""

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import In, NodeLabelSchedulingStrategy, NotIn

import merging
from merging.errors import ClusterError
from merging.io.memory import available_memory
from ray_tasks.sessions import mark, remove_dead

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Workers say little, and leave the cores to the threads that they are given."""


JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a submitted job's driver of the job's own runtime environment."""
ANSWER_SECONDS = 5.0
"""How long a cluster's head may take to accept a connection."""
SOCKET_BYTES = 107
"""Most bytes of a Unix socket's path."""
PROGRAM = Path(merging.__file__).resolve().parents[1]
"""Where the program's packages lie: a checkout, or among what is installed."""

LOCAL = "local"
"""The address of a cluster that this process started for itself."""
NODE_LABEL = "ray.io/node-id"
"""Ray's own label of every node."""


@dataclass(frozen=True)
class NodeKind:
    """Which nodes work may be started on.

    Args:
        accelerator_type: Ray's name of the GPUs (`A100`, `H100`); None for any.
        labels: Ray's labels of nodes that must have these values.
    """

    accelerator_type: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def fits(self, node: Mapping[str, Any]) -> bool:
        """Whether Ray's entry of a node says so."""
        of_type = self.accelerator_type is None or f"accelerator_type:{self.accelerator_type}" in node["Resources"]
        own = node.get("Labels") or {}
        return of_type and all(own.get(name) == value for name, value in self.labels.items())

    def options(self, avoided: Collection[str] = ()) -> dict[str, Any]:
        """As Ray's options of a task or actor; empty where every node may be taken.

        Args:
            avoided: Nodes, as Ray names them, that are not to be taken.
        """
        wanted: dict[str, Any] = {name: In(value) for name, value in self.labels.items()}
        if avoided:
            wanted[NODE_LABEL] = NotIn(*sorted(avoided))
        options: dict[str, Any] = {"scheduling_strategy": NodeLabelSchedulingStrategy(wanted)} if wanted else {}
        return options | ({"accelerator_type": self.accelerator_type} if self.accelerator_type is not None else {})

    def there(self, nodes: Iterable[Mapping[str, Any]]) -> list[str]:
        """What Ray's entries of nodes have instead, for messages."""
        nodes = list(nodes)
        types = {
            name.partition(":")[2]
            for node in nodes
            for name in node["Resources"]
            if name.startswith("accelerator_type:")
        }
        there = (
            [f"the cluster's accelerator types are {', '.join(sorted(types)) or 'none'}"]
            if self.accelerator_type
            else []
        )
        for label in self.labels:
            values = {value for node in nodes if (value := (node.get("Labels") or {}).get(label)) is not None}
            there.append(f"its nodes' values of label {label} are {', '.join(sorted(values)) or 'none'}")
        return there

    def describe(self) -> str:
        """For messages."""
        named = [f"label {name}={value}" for name, value in self.labels.items()]
        return " and ".join([*([f"accelerator type {self.accelerator_type}"] if self.accelerator_type else []), *named])


ANY_NODE = NodeKind()


@dataclass(frozen=True)
class WorkerEnvironment:
    """What workers have besides their nodes' own environment.

    Args:
        env: Environment variables.
        secrets: Such as nobody may see: Ray shows the others in its dashboard, and writes them into its logs.
        pip: Packages to install on every node.
        working_dir: Local directory to send to every node.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    pip: tuple[str, ...] = ()
    working_dir: str | None = None

    def runtime(self) -> dict[str, Any]:
        """As Ray's `runtime_env`, but for what the job says that this process runs in: Ray refuses to hear it twice."""
        job = _job()
        said = job.get("env_vars") or {}
        variables = {**WORKER_ENVIRONMENT, **self.env}
        runtime: dict[str, Any] = {"env_vars": {name: v for name, v in variables.items() if name not in said}}
        if self.pip and "pip" not in job:
            runtime["pip"] = list(self.pip)
        if self.working_dir is not None and "working_dir" not in job:
            runtime["working_dir"] = self.working_dir
        if self.secrets:
            secrets = dict(self.secrets)

            def set_secrets() -> None:  # travels by value, through the cluster's own store
                import os

                os.environ.update(secrets)

            runtime["worker_process_setup_hook"] = set_secrets
        return runtime


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

    def now(self, kind: NodeKind = ANY_NODE) -> "Cluster":
        """What there is by now, of nodes of a kind."""
        return describe_cluster(self.address, kind)

    def describe(self) -> str:
        """One line for users."""
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"Ray {self.address}: {self.nodes} node{'s' * (self.nodes > 1)}, {self.cpus} CPUs{gpus}"


class DriverConfig(JobConfig):  # type: ignore[misc]  # Ray's class has no type
    """A job whose workers search the same modules as any Python on their node.

    Ray puts the driver's working directory first on its workers' path, so that a `search/` or `yaml.py` in it would be
    imported instead of ours. It does not where a job brings a directory of its own, and asks for that here.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return Path.cwd() != PROGRAM or bool(super()._runtime_env_has_working_dir())


@contextmanager
def connect(environment: WorkerEnvironment | None = None) -> Iterator[Cluster]:
    """Joins the cluster that `RAY_ADDRESS` names, or starts a local one for the block.

    A local cluster is bound to loopback, asks for a token, and ends with the block. One that is running already in this
    process is used and left as it is.

    Args:
        environment: What workers have besides their nodes' own; not looked at where a cluster is used that is running already.

    Raises:
        ClusterError: The cluster cannot be reached or refuses the token.
    """
    if ray.is_initialized():
        yield describe_cluster(ray.get_runtime_context().gcs_address)
        return
    chosen = os.environ.get("RAY_ADDRESS")
    if chosen:
        _require_answer(chosen)
    else:
        _require_short_sockets()
        remove_dead(Path(_scratch()) / "ray")
    options: dict[str, Any] = {"address": chosen} if chosen else {"address": LOCAL, "include_dashboard": False}
    runtime = (environment or WorkerEnvironment()).runtime()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            **options,
            job_config=DriverConfig(),
            runtime_env=runtime,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (Exception, SystemExit) as error:  # where a process of Ray's own does not start, it raises no one type
        ray.shutdown()
        if chosen:
            remedy = "is it running (RAY_ADDRESS, --address), and does RAY_AUTH_TOKEN hold its token?"
        else:
            remedy = f"see the logs in {_scratch()}/ray/session_latest/logs; is there room on disk and in memory?"
        text = str(error).strip() or type(error).__name__
        raise ClusterError(f"cannot {'join ' + chosen if chosen else 'start a local Ray'}: {text}\n{remedy}") from error
    if not chosen:
        mark(Path(ray._private.worker._global_node.get_session_dir_path()))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place, which exits without a word
    try:
        yield describe_cluster(ray.get_runtime_context().gcs_address if chosen else LOCAL)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Looks whether anybody listens at an address; Ray itself would try for minutes.

    Raises:
        ClusterError: Nobody does, or it is no address of Ray's.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is a dashboard's address, which `mergequest submit --address` takes; here HOST:PORT of the head is "
            "needed, or `auto`"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and other words of Ray's
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ClusterError(
            f"nobody answers at {address} ({error}): is the cluster of RAY_ADDRESS or --address still running? Unset it for a "
            "Ray of its own on this machine"
        ) from error


def _require_short_sockets() -> None:
    """Looks whether the paths of a local Ray's sockets will be short enough for the operating system.

    Raises:
        ClusterError: They will not.
    """
    longest = f"{_scratch()}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    if (over := len(longest.encode()) - SOCKET_BYTES) > 0:
        raise ClusterError(
            f"cannot start a local Ray: RAY_TMPDIR ({_scratch()}) is {over} characters too long for the paths of its sockets. "
            "Set RAY_TMPDIR to a shorter directory"
        )


def _scratch() -> str:
    """Where a local Ray keeps sockets and logs."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _job() -> dict[str, Any]:
    """The runtime environment of the job that this process runs in; empty outside of one."""
    try:
        runtime = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    except (ValueError, AttributeError):
        return {}
    return runtime if isinstance(runtime, dict) else {}


def evaluators_for(cluster: Cluster, wanted: int | None, threads: int, gpus: float | None, bytes_each: int) -> int:
    """How many evaluators to start: as many as were asked for, or as the cluster holds.

    Args:
        cluster: What there is.
        wanted: A number that a user set; where nodes may join, the cluster need not hold so many yet.
        threads: CPUs of an evaluator.
        gpus: GPUs of an evaluator; 0 for none.
        bytes_each: Estimated memory of an evaluator.

    Raises:
        ClusterError: Not one fits, or what was asked for does not.
    """
    if wanted and cluster.may_grow:
        return wanted
    limit = cluster.places(threads, gpus or 0.0)
    if limit < 1 and cluster.may_grow:
        raise ClusterError(
            f"no evaluator fits {cluster.describe()}: where nodes come as they are asked for, say how many evaluators are to "
            "ask for them with resources.evaluators, and for which GPUs with resources.gpus; else lower resources.threads "
            "or resources.gpus"
        )
    if limit < 1 or (wanted or 0) > limit:
        what = f"{gpus:g} GPUs and {threads} CPUs" if gpus else f"{threads} CPUs"
        raise ClusterError(
            f"{wanted or 1} evaluators of {what} do not fit {cluster.describe()}: lower resources.evaluators, "
            "resources.threads or resources.gpus"
        )
    return wanted or room_for(cluster, threads, gpus or 0.0, bytes_each)


def gpus_each(wanted: float | None) -> float:
    """GPUs of a process: what a user set, else one where the cluster has any."""
    return wanted if wanted is not None else float(bool(ray.cluster_resources().get("GPU")))


def device_each(wanted: float | None) -> float:
    """GPUs of a process that computes on one device: one at most, of as many as a user set for an evaluator."""
    return min(gpus_each(wanted), 1.0)


def room_for(cluster: Cluster, threads: int, gpus: float, bytes_each: int) -> int:
    """How many evaluators the cluster holds at once: as many as its GPUs, or cores and memory, allow."""
    room = cluster.places(threads, gpus)
    if not gpus and cluster.nodes == 1:
        room = min(room, int(available_memory() * 0.7 / max(bytes_each, 1)))
    elif not gpus and cluster.memory:
        room = min(room, cluster.memory // max(bytes_each, 1))
    return max(1, room)


def require_nodes(kind: NodeKind, gpus: float, memory: int = 0) -> None:
    """Looks whether there is a node that an evaluator could start on.

    Args:
        kind: Which nodes may be taken.
        gpus: GPUs of an evaluator.
        memory: Bytes that it asks its node for.

    Raises:
        ClusterError: No node of the kind is there, or none with so many GPUs, or of these none with so much memory.
    """
    nodes = alive_nodes()
    fitting = [node for node in nodes if kind.fits(node)]
    if not fitting:
        raise ClusterError(
            f"no node has {kind.describe()}: {'; '.join(kind.there(nodes))}; correct resources.accelerator_type or "
            "resources.labels (`ray start --labels`), or say how many evaluators are to wait for such nodes with "
            "resources.evaluators"
        )
    if gpus > (most := max(node["Resources"].get("GPU", 0.0) for node in fitting)):
        raise ClusterError(
            f"an evaluator of {gpus:g} GPUs fits no node: the largest has {most:g}; lower resources.gpus, or say how many "
            "evaluators are to wait for larger nodes with resources.evaluators"
        )
    enough = [node["Resources"] for node in fitting if node["Resources"].get("GPU", 0.0) >= gpus]
    if memory > (most := max(resources.get("memory", 0.0) for resources in enough)):
        raise ClusterError(
            f"an evaluator that asks for {memory / 1e9:.3g} GB fits no node: the most that one lends is {most / 1e9:.3g} GB "
            "(`ray start --memory`); lower resources.memory, or say how many evaluators are to wait for larger nodes with "
            "resources.evaluators"
        )


def describe_cluster(address: str = LOCAL, kind: NodeKind = ANY_NODE) -> Cluster:
    """What the cluster that this process has joined has now.

    Args:
        address: Where it was joined, or `LOCAL`.
        kind: Which of its nodes count.
    """
    entries = [node for node in alive_nodes() if kind.fits(node)]
    nodes = [node["Resources"] for node in entries]
    cpus, gpus, memory = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU", "memory"))
    sizes = tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    return Cluster(address, len(nodes), int(cpus), float(gpus), int(memory), sizes)


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's entries of the nodes that are alive now."""
    return [node for node in ray.nodes() if node["Alive"]]


def _places(cpus: float, gpus: float, threads: int, share: float) -> int:
    """How many processes a node holds."""
    by_cpu = int(cpus // threads)
    if not share:
        return by_cpu
    by_gpu = int(gpus / share + 1e-9) if share >= 1 else int(gpus) * int(1 / share + 1e-9)
    return min(by_cpu, by_gpu)
