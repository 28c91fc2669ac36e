"""One data set cut into members' data that differ in their classes."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flows.config.train_file import Partition
from merging.errors import SettingsError
from merging.io import atomic, storage
from merging.tasks import AnyTaskSettings
from merging.tasks.labelled_texts import read_table

COLUMNS = ("text", "text_pair", "image", "label")
"""Settings that name a column of an example."""
DRAWS = 1000
"""How often shares are drawn before no part of them is taken to do."""


def dirichlet(labels: npt.NDArray[Any], parts: int, concentration: float, seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """Places of examples in parts whose shares of every class are Dirichlet draws (Hsu et al. 2019; RegMean, appendix B).

    Shares are drawn again until every part has two classes, for nothing can be learnt from one.

    Args:
        labels: Each example's class [N].
        parts: How many parts.
        concentration: α of the symmetric distribution, above 0: 0.1 gives parts of few classes, 100 parts that are alike.
        seed: Of shares and order.

    Returns:
        Places of each part's examples, sorted; every example is in one part.

    Raises:
        SettingsError: No draw had two classes in every part.
    """
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == name) for name in np.unique(labels)]
    for _ in range(DRAWS):
        places_of: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(parts)]
        for own in classes:
            shares = generator.dirichlet(np.full(parts, concentration))
            cuts = np.round(np.cumsum(shares)[:-1] * len(own)).astype(np.int64)
            for part, places in zip(places_of, np.split(generator.permutation(own), cuts), strict=True):
                part.append(places)
        if all(sum(len(places) > 0 for places in part) > 1 for part in places_of):
            return [np.sort(np.concatenate(part)) for part in places_of]
    raise SettingsError(
        f"partition: of {DRAWS} draws none gave {parts} parts with two classes each from {len(labels)} examples of "
        f"{len(classes)} classes: raise `concentration` ({concentration:g}), or lower `parts`"
    )


def write_parts(task: AnyTaskSettings, partition: Partition, directory: Path) -> dict[str, AnyTaskSettings]:
    """Writes a task's train split in parts.

    Args:
        task: The task, with a column of labels.
        partition: How to cut.
        directory: Gets `<member>.parquet`.

    Returns:
        Member → the task with the member's part as its train split, and no other.

    Raises:
        SettingsError: The examples cannot be cut so, or lie in folders.
        TaskError: The data are unusable.
        StorageError: There is no right or no space to write.
    """
    given: Any = task
    files = [given.data["train"]] if isinstance(given.data["train"], str) else list(given.data["train"])
    if folders := [file for file in files if storage.is_dir(file)]:
        raise SettingsError(f"partition: {folders[0]} is a folder: name files of a table (Parquet, CSV or JSON lines)")
    columns = [name for key in COLUMNS if (name := getattr(given, key, None)) is not None]
    frame = read_table(files, columns)
    settings_of: dict[str, AnyTaskSettings] = {}
    parts = dirichlet(frame[given.label].to_numpy(), partition.parts, partition.concentration, partition.seed)
    for number, places in enumerate(parts, start=1):
        name = f"{partition.task}-{number}"
        file = directory / f"{name}.parquet"
        atomic.write_bytes(str(file), frame.iloc[places].to_parquet(index=False))
        settings_of[name] = given.model_copy(update={"data": {"train": str(file)}})
    return settings_of
