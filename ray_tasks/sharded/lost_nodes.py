"""Where shards lie, looked at now and then: a node that takes some along is worth a word, and so is waiting for another."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import ray

from ray_tasks.connect import alive_nodes

LOOK = 2.0
"""Seconds between two looks."""
SILENCE = 30.0
"""Seconds without a place for a shard after which that is said, and again after four times as long."""


class NodeWatch:
    """What is known of the places, and what has been said of it.

    Args:
        nodes: The node of each shard.
        say: Told of changes, in a line for users.
    """

    def __init__(self, nodes: Sequence[str], say: Callable[[str], None]) -> None:
        self._nodes = list(nodes)
        self._say = say
        self._homeless: dict[int, float] = {}

    def look(self, nodes: Sequence[str], alive: Mapping[str, str], now: float) -> None:
        """Compares with the last look.

        Args:
            nodes: The node of each shard now.
            alive: Node → address, of those that are alive.
            now: Seconds of any steady clock.
        """
        lost = [number for number, node in enumerate(self._nodes) if node not in alive and number not in self._homeless]
        if lost:
            self._homeless |= dict.fromkeys(lost, now + SILENCE)
            self._say(f"a node was lost, and {_named(lost)} with it: read again where there is room")
        returned = [number for number in self._homeless if nodes[number] in alive]
        for number in returned:
            self._nodes[number] = nodes[number]
            del self._homeless[number]
        if returned:
            places = sorted({alive[nodes[number]] for number in returned})
            self._say(f"{_named(returned)} found room on {', '.join(places)}")
        if waiting := [number for number, when in self._homeless.items() if now >= when]:
            self._say(f"no node has room for {_named(waiting)}: waiting for one to join")
            self._homeless |= dict.fromkeys(waiting, now + 4 * SILENCE)


@contextmanager
def watched(nodes: Callable[[], Sequence[str]], say: Callable[[str], None]) -> Iterator[None]:
    """Says, within the block, what becomes of shards whose nodes are lost.

    Args:
        nodes: Gives the node of each shard.
        say: Told of changes, from a thread of its own.
    """
    watch, done = NodeWatch(nodes(), say), threading.Event()

    def keep_looking() -> None:
        while not done.wait(LOOK):
            with suppress(ray.exceptions.RayError, RuntimeError):  # a head that does not answer now
                watch.look(nodes(), addresses(), time.monotonic())

    looks = threading.Thread(target=keep_looking, name="mergequest-shards", daemon=True)
    looks.start()
    try:
        yield
    finally:
        done.set()
        looks.join(LOOK)  # no longer where the head is gone: it is a daemon


def addresses() -> dict[str, str]:
    """Nodes that are alive → names for users, no two alike."""
    return {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})" for node in alive_nodes()}


def _named(numbers: Sequence[int]) -> str:
    return f"shard{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
