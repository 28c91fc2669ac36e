"""What tests of work on the cluster share: waiting for answers, and a killer of one of those who give them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest


@pytest.fixture(scope="session")
def collect() -> Callable[..., dict[str, Any]]:
    """Waits for so many answers of a pool of evaluators: `collect(pool, 2)` gives them by ticket."""

    def wait(pool: Any, count: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        deadline = time.monotonic() + 120
        while len(result) < count and time.monotonic() < deadline:
            result |= {done.ticket: done for done in pool.wait(5.0)}
        return result

    return wait


@pytest.fixture(scope="session")
def kill_one() -> Callable[[str], Any]:
    """Kills the first worker of this process whose command line holds a name: `with kill_one("_measure"): …`."""

    @contextmanager
    def lurk(name: str) -> Iterator[None]:
        killed: list[int] = []
        deadline = time.monotonic() + 60

        def look() -> None:
            while not killed and time.monotonic() < deadline:
                for process in psutil.Process().children(recursive=True):
                    try:
                        if any(name in part for part in process.cmdline()):
                            os.kill(process.pid, signal.SIGKILL)
                            killed.append(process.pid)
                            return
                    except psutil.Error:
                        continue
                time.sleep(0.01)

        assassin = threading.Thread(target=look)
        assassin.start()
        yield
        assassin.join()
        assert killed, f"a worker of {name} was to be killed"

    return lurk
