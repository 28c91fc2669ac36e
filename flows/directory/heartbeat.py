"""A driver's signs of life: a small file in the campaign's directory, for whoever looks from another machine."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from merging.errors import MergequestError, StorageError
from merging.io import addresses, atomic
from merging.io.secrets import storable
from search.steering import Steering, StoppedError

if TYPE_CHECKING:
    from search.budget import Progress

FILE = "progress.json"
MOST = 32
"""Candidates under way that are written, at most."""
BEAT = 5.0
"""Seconds between two signs of life."""


@dataclass
class Pulse:
    """What a driver is doing; whoever does it says so.

    Args:
        phase: What is under way.
        evaluators: Says how many evaluators there are, and how many are at work.
        progress: How the search gets on, once it does.
        under_way: Says what evaluators are at work on, the longest first: candidate, split, method, members, seconds,
            share that is done.
        steering: What others have to say to the driver.
        look: Looks for it.
    """

    phase: str = ""
    evaluators: Callable[[], tuple[int, int]] = lambda: (0, 0)
    progress: "Progress | None" = None
    under_way: Callable[[], list[dict[str, Any]]] = list
    steering: Steering = field(default_factory=Steering)
    look: Callable[[], None] = lambda: None

    def as_dict(self) -> dict[str, Any]:
        """The file's content, but for who writes it."""
        there, busy = self.evaluators()
        progress = self.progress
        return {
            "heard": datetime.now(UTC).isoformat(timespec="seconds"),
            "phase": self.phase,
            "evaluators": there,
            "busy": busy,
            "under_way": self.under_way()[:MOST],
            "per_minute": progress.per_minute if progress else None,
            "seconds_left": progress.seconds_left if progress else None,
        }


@contextmanager
def heartbeat(directory: str, pulse: Pulse, name: str = "", every: float = BEAT) -> Iterator[None]:
    """Writes `progress.json` for the block, every few seconds, and at its end how that came.

    A store that is away for a while stops nothing: the file is for looking at.

    Args:
        directory: The campaign's directory.
        pulse: What to write.
        name: The campaign's, for who looks before its file is there.
        every: Seconds between two writes.
    """
    path, who = addresses.join(directory, FILE), {"name": name, "host": socket.gethostname(), "pid": os.getpid()}

    def write(ended: str | None) -> None:
        with suppress(StorageError):
            atomic.write_json(path, {**pulse.as_dict(), **who, "ended": ended})

    def beat() -> None:
        while True:
            write(None)
            with suppress(Exception):  # a store that is away, whatever its client raises
                pulse.look()
            if done.wait(every):
                return

    done, ended = threading.Event(), "finished"
    beats = threading.Thread(target=beat, name="mergequest-heartbeat", daemon=True)
    beats.start()
    try:
        yield
    except BaseException as error:
        reason = (
            f": {storable(str(error))}" if isinstance(error, MergequestError) else ""
        )  # what others say may hold anything
        if isinstance(error, StoppedError):
            ended = "stopped"
        else:
            ended = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__ + reason
        raise
    finally:
        done.set()
        beats.join()
        write(ended)
