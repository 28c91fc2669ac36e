"""Merged weights that shards write straight into evaluators' memory: by RDMA where nodes have it, else shared memory or TCP.

NIXL is what Ray's own direct transport moves CPU and GPU tensors with. It is used without Ray's wrapper, which as of Ray 2.60
cannot reach an actor that was started again, and keeps a file open for every object that was ever sent (docs/regimes.md).
"""

import atexit
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from merging.errors import ClusterError
from ray_tasks.sharded.lost_nodes import addresses

BUFFERS = 2
"""While an evaluator copies one candidate's weights out of a buffer, the next one's are written into the other."""
PATIENCE = 30.0
"""Seconds that a write may take, beside those for its bytes."""
SLOWEST = 20e6
"""Bytes a second below which a connection counts as broken."""
POLL = 0.001
CHECK_SECONDS = 120.0


class UnreachableError(Exception):
    """What was to be written did not arrive, and never will over this connection."""


@dataclass(frozen=True)
class Address:
    """Where shards write to: small, for it travels with every candidate.

    Args:
        name: The receiving agent's; no process ever has another's.
        agent: How to reach it, in NIXL's words.
        places: For every buffer, each shard's place in it, in NIXL's words.
    """

    name: str
    agent: bytes
    places: tuple[tuple[bytes, ...], ...]


class ReceiveBuffers:
    """An evaluator's memory that shards write to.

    Args:
        parts: Bytes of each shard's part of the weights.

    Raises:
        ClusterError: There is no NIXL here, or it cannot start.
    """

    def __init__(self, parts: Sequence[int]) -> None:
        self._agent, name = _start_agent()
        self._buffers = [[torch.empty(size, dtype=torch.uint8) for size in parts] for _ in range(BUFFERS)]
        for buffer in self._buffers:
            self._agent.register_memory(buffer)
        self.address = Address(
            name,
            self._agent.get_agent_metadata(),
            tuple(tuple(self._described(part) for part in buffer) for buffer in self._buffers),
        )
        """For the shards."""
        # NIXL's own thread for this never rests: a quarter of a core and more in every process, at work or not
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._progress, daemon=True)
        self._thread.start()
        atexit.register(self._end)  # a thread that Python ends within NIXL takes the process along

    def part(self, shard: int, turn: int) -> Tensor:
        """What a shard wrote in a turn [bytes]: a view, overwritten `BUFFERS` turns later."""
        return self._buffers[turn % BUFFERS][shard]

    def _progress(self) -> None:
        while not self._ended.is_set():
            self._agent.get_new_notifs()
            time.sleep(POLL)

    def _end(self) -> None:
        self._ended.set()
        self._thread.join(1.0)

    def _described(self, part: Tensor) -> bytes:
        described: bytes = self._agent.get_serialized_descs(self._agent.get_xfer_descs([part]))
        return described


class Writer:
    """A shard's way to the buffers of all evaluators.

    Args:
        values: What is written, again and again from the same memory.
        shard: Which of the shards this is.

    Raises:
        ClusterError: There is no NIXL here, or it cannot start.
    """

    def __init__(self, values: Tensor, shard: int) -> None:
        self._agent, _ = _start_agent()
        self._agent.register_memory([values])
        self._values = self._agent.get_xfer_descs([values])
        self._shard = shard
        self._seconds = PATIENCE + values.nbytes / SLOWEST
        self._turns: dict[str, int] = {}
        self._broken: set[str] = set()

    def write(self, address: Address, turn: int) -> None:
        """Writes the values into an evaluator's buffer; returns when they are there.

        Args:
            address: The evaluator's.
            turn: Of the candidate among those that are sent there.

        Raises:
            UnreachableError: They did not arrive, now or before.
            RuntimeError: A later turn was written already: Ray repeats calls whose shard died over them, in any order.
        """
        name = address.name
        if name in self._broken:
            raise UnreachableError("an earlier write to it failed")
        if turn < self._turns.get(name, 0):
            raise RuntimeError(f"turn {turn} came after turn {self._turns[name]}")
        try:
            if name not in self._turns:
                self._agent.add_remote_agent(address.agent)
            self._turns[name] = turn
            self._transfer(name, address.places[turn % BUFFERS][self._shard])
        except Exception as error:
            self._broken.add(name)
            why = f"{type(error).__name__}: {error}"
            try:
                self._agent.remove_remote_agent(name)  # cuts off what may still be on its way
            except Exception as again:
                why += f", then {type(again).__name__}: {again}"
            raise UnreachableError(why) from error

    def _transfer(self, name: str, place: bytes) -> None:
        agent = self._agent
        handle = agent.initialize_xfer("WRITE", self._values, agent.deserialize_descs(place), name)
        try:
            state, deadline = agent.transfer(handle), time.monotonic() + self._seconds
            while state == "PROC":
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not written within {self._seconds:.0f} s")
                time.sleep(POLL)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise ConnectionError(f"the transfer ended as {state}")
        finally:
            agent.release_xfer_handle(handle)


def require_direct() -> None:
    """Looks whether every node could write and be written to.

    Raises:
        ClusterError: A node has no NIXL, or it cannot start there.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(_missing)
    names = addresses()
    checks = {
        node: probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in names
    }
    ray.wait(list(checks.values()), num_returns=len(checks), timeout=CHECK_SECONDS)
    for node, reference in checks.items():
        try:
            wrong = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            wrong = f"no answer within {CHECK_SECONDS:.0f} s"
        except ray.exceptions.RayError:
            continue  # the node is gone
        if wrong:
            raise ClusterError(f"resources.transport: nixl, and on node {names[node]}: {wrong}")


def _missing() -> str:
    """What is wrong with this node; empty for nothing."""
    try:
        _start_agent()
    except ClusterError as error:
        return str(error)
    return ""


def _start_agent() -> tuple[Any, str]:
    """A NIXL agent and its name.

    A process that is started again has another name: agents that knew the old one would take the two for one.
    """
    if os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0":  # Ray itself listens on loopback only
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise ClusterError(f"there is no NIXL ({error}): pip install 'mergequest[nixl]' there (Linux only)") from error
    name = uuid.uuid4().hex
    try:
        return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"])), name
    except Exception as error:
        raise ClusterError(
            f"NIXL cannot start ({type(error).__name__}: {error}): look at UCX_TLS and UCX_NET_DEVICES, or leave out "
            "resources.transport"
        ) from error
