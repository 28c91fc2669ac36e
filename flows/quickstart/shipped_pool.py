"""What a pool of the quick start is: a base, tasks with data, and how members are fine-tuned, searched and judged."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd

from flows.quickstart.fetch import Progress
from merging.io import atomic, documents, hashing
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import SPLITS, Split

Item = TypeVar("Item")
Files = dict[str, dict[Split, Path]]
"""Task → split → file."""


@dataclass(frozen=True)
class ShippedPool:
    """A pool that is built from nothing.

    Args:
        about: What it consists of, in a few words.
        base: Makes the base's directory below the cache, unless it is there, and returns it.
        data: Fetches what the tasks' data are cut from into the cache and writes them below a directory.
        task: What a campaign file says of each task, without its data.
        labels: Task → classes of its head; empty where the base's own head serves all.
        training: How members are fine-tuned, each on its task.
        methods: What the search tries.
        candidates: How much of it.
        statistics: The campaign file's section.
        distil: Its section on distillation; False for none.
        calibration: What it says of each member's own examples, without their data; None where they are the task's.
        resources: Its section.
    """

    about: str
    base: Callable[[Path, Progress], Path]
    data: Callable[[Path, Path, Progress], Files]
    task: Mapping[str, Any]
    labels: Mapping[str, Sequence[str]]
    training: TrainingSettings
    methods: Sequence[str]
    candidates: int
    statistics: Mapping[str, Any] = field(default_factory=dict)
    distil: Mapping[str, Any] | Literal[False] = False
    calibration: Mapping[str, Any] | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)


def cut(groups: Mapping[str, Sequence[Item]], sizes: Mapping[Split, int], seed: int = 0) -> dict[Split, list[Item]]:
    """Cuts examples into splits, whole groups at a time in a random order; test and validation are filled first.

    Args:
        groups: Examples of each group; those of one group stay in one split.
        sizes: At most this many examples a split: its last group may be cut.
        seed: Of the order.
    """
    order = list(groups)
    random.Random(seed).shuffle(order)
    parts: dict[Split, list[Item]] = {}
    for name in reversed(SPLITS):
        part: list[Item] = []
        while order and len(part) < sizes[name]:
            part += groups[order.pop()]
        parts[name] = part[: sizes[name]]
    return {name: parts[name] for name in SPLITS}


def written(
    directory: Path, tasks: Sequence[str], key: Any, make: Callable[[], Mapping[str, Mapping[Split, pd.DataFrame]]]
) -> Files:
    """Writes each task's splits as Parquet files, unless they are there and were made from the same key.

    Args:
        directory: Gets `<task>/<split>.parquet`.
        tasks: Their names.
        key: What decides over the data: sizes, seeds, sources; JSON-like.
        make: Makes the data: task → split → frame.

    Raises:
        StorageError: There is no right or no space to write, or what `make` raises.
    """
    key = hashing.fingerprint(key)
    files: Files = {task: {name: directory / task / f"{name}.parquet" for name in SPLITS} for task in tasks}
    marker = directory / "splits.json"
    there = all(file.exists() for parts in files.values() for file in parts.values())
    if there and marker.exists() and documents.read_json(str(marker)) == key:
        return files
    for task, parts in make().items():
        for name, frame in parts.items():
            atomic.write_bytes(str(files[task][name]), frame.to_parquet(index=False))
    atomic.write_json(str(marker), key)
    return files


def first_examples(files: Files, directory: Path, most: int) -> Files:
    """Writes the first examples of every split below another directory.

    Args:
        files: The splits.
        directory: Gets `<task>/<split>.parquet`.
        most: Of each split at most so many.

    Raises:
        StorageError: There is no right or no space to write.
    """
    cut_files: Files = {task: {name: directory / task / f"{name}.parquet" for name in files[task]} for task in files}
    for task, parts in files.items():
        for name, file in parts.items():
            frame = pd.read_parquet(file)[:most]
            atomic.write_bytes(str(cut_files[task][name]), frame.to_parquet(index=False))
    return cut_files
