"""One data set cut into members' data that differ in their classes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from flows.config.train_file import Partition
from merging.errors import SettingsError
from merging.io import atomic, storage
from merging.tasks import AnyTaskSettings
from merging.tasks.labelled_texts import read_table
from merging.tasks.labels import label_columns

TEXTS = ("text", "text_pair", "image")
"""Settings that name a column of an example, beside its label."""
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


def strata(frame: pd.DataFrame, label: str | Sequence[str]) -> npt.NDArray[Any]:
    """What each example counts as when examples are shared out: its class; of several labels, the rarest that it has.

    Args:
        frame: Examples.
        label: The column of classes, or of lists of labels or of flags; or columns of flags, one for each label.

    Returns:
        One value an example [N]; `""` for an example without any label.

    Raises:
        SettingsError: Labels are missing, or are numbers that no class has.
    """
    values = frame[label] if isinstance(label, str) else None
    if values is not None and not values.map(_is_list).any():
        if values.isna().any():
            raise SettingsError(f"partition: column '{label}' lacks labels in {int(values.isna().sum())} rows")
        if pd.api.types.is_float_dtype(values) and (values % 1 != 0).any():
            raise SettingsError(f"partition: parts differ in classes, and column '{label}' holds numbers, not classes")
        return (values.astype(str) if values.dtype == object else values).to_numpy()
    if values is None:
        own = [[name for name, flag in zip(label, row, strict=True) if flag] for row in frame[list(label)].to_numpy()]
    else:
        own = [_labels_of(value) for value in values]
    counts = Counter(name for names in own for name in names)
    return np.array([min(names, key=lambda name: (counts[name], name), default="") for names in own])


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str)


def _labels_of(value: Any) -> list[str]:
    """Names or positions of a list of labels as text; of a list of flags the positions of those that are set."""
    entries = list(value) if _is_list(value) else []
    if entries and all(isinstance(entry, bool | float | np.bool_ | np.floating) for entry in entries):
        return [str(place) for place, flag in enumerate(entries) if flag]
    return [str(entry) for entry in entries]


def write_parts(task: AnyTaskSettings, partition: Partition, directory: Path) -> dict[str, AnyTaskSettings]:
    """Writes a task's train split in parts.

    Args:
        task: The task, with labels.
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
    texts = [name for key in TEXTS if (name := getattr(given, key, None)) is not None]
    frame = read_table(files, [*texts, *label_columns(given.label)], texts)
    settings_of: dict[str, AnyTaskSettings] = {}
    parts = dirichlet(strata(frame, given.label), partition.parts, partition.concentration, partition.seed)
    for number, places in enumerate(parts, start=1):
        name = f"{partition.task}-{number}"
        file = directory / f"{name}.parquet"
        atomic.write_bytes(str(file), frame.iloc[places].to_parquet(index=False))
        settings_of[name] = given.model_copy(update={"data": {"train": str(file)}})
    return settings_of
