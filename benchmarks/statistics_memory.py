"""What a statistic's sums take while several processes measure it: `python benchmarks/statistics_memory.py --help`.

A random causal language model and random examples, measured by as many processes as there are cores. Prints, for each kind
of statistic: seconds of it all, and the most memory of its own that a process had.
"""

import argparse
import math
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import statistics_cost
from merging.statistics import STATISTICS, StatisticsFile
from merging.tasks.task import Task
from ray_tasks.connect import connect
from ray_tasks.jobs.statistics import BoundTask, Job, compute


@dataclass(frozen=True)
class RandomBound(BoundTask):
    """A random task, made where it is used."""

    def open(self) -> Task:
        """The task."""
        return statistics_cost.RandomTask(self.settings)


class Memory:
    """Looks every few milliseconds, from a thread, at what processes have."""

    def __init__(self) -> None:
        self.process = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "_Process" in "".join(process.cmdline()):
                        own = Path(f"/proc/{process.pid}/status").read_text()
                        line = next(line for line in own.splitlines() if line.startswith("RssAnon"))
                        self.process = max(self.process, int(line.split()[1]) << 10)
                except (psutil.Error, OSError, StopIteration):
                    continue


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--shard", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["fisher", "gram"])
    options = parser.parse_args()
    more = {"kind": "causal_lm", "device": "cpu", "untied": False, "filled": 1.0, "targets": 2, "classes": 3}
    settings = argparse.Namespace(**vars(options), **more)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # where workers find the task
    from benchmarks import statistics_memory as shared  # by its name, not as `__main__`

    bound: Any = shared.RandomBound("random", settings, "")
    with connect(), tempfile.TemporaryDirectory() as place:
        for kind in options.kinds:
            chosen = STATISTICS[kind].settings_type(examples=options.examples, batch_size=options.shard)
            path = str(Path(place) / kind)
            job = Job("m", kind, chosen, bound, bound, "train", options.examples, path, {"checkpoint": "", "data": ""})
            start = time.perf_counter()
            with Memory() as memory:
                compute([job], shard=options.shard, threads=1, gpus=0.0, retries=0)
            file = StatisticsFile.open(path)
            stored = [name for name in file.names if name not in file.shared]
            size = sum(4 * math.prod(file.shape(name)) for name in stored)
            print(
                f"{kind}: {size / 1e6:.0f} MB; {time.perf_counter() - start:.0f} s; a process's own memory "
                f"{memory.process / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
