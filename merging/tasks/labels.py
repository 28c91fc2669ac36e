"""Columns of labels as numbers: one class an example, several labels at once, or numbers."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merging.errors import TaskError
from merging.tasks.likelihood import Likelihood
from merging.tasks.predictions import Floats
from merging.tasks.task import IGNORED

if TYPE_CHECKING:
    import pandas as pd

SHOWN, LONGEST = 5, 100
"""Of a message: values, and characters of a value."""
MAX_CLASSES = 1 << 16
"""Of a head: a label beyond is no class's number."""


def label_columns(label: str | Sequence[str] | None) -> list[str]:
    """Names of the columns that hold labels."""
    return [] if label is None else [label] if isinstance(label, str) else list(label)


def read_labels(
    frame: "pd.DataFrame",
    label: str | Sequence[str] | None,
    classes: Sequence[str],
    likelihood: Likelihood,
    problems: list[str],
) -> npt.NDArray[Any]:
    """A table's labels.

    Args:
        frame: The table.
        label: The column, or of several labels or numbers one column for each; None where there are no labels.
        classes: Names of the head's outputs, in order.
        likelihood: What the head's logits are parameters of.
        problems: What is wrong is added here, and the labels are of no use then.

    Returns:
        Class indices [N], −100 where there are none; or 0 and 1, or numbers [N, C] in float64, NaN where there are none.
    """
    if likelihood == "categorical":
        if label is None:
            return np.full(len(frame), IGNORED)
        if not isinstance(label, str):
            problems.append(f"`label` names {len(label)} columns, but each example has one class: name one column")
            return np.full(len(frame), IGNORED)
        return class_indices(frame[label], label, classes, problems)
    if label is None:
        return np.full((len(frame), len(classes)), np.nan)
    if isinstance(label, str):
        parse = _parser(classes, likelihood)
        return _parsed(frame[label], label, parse, len(classes), problems)
    if len(label) != len(classes):
        problems.append(f"`label` names {len(label)} columns, the head has {len(classes)} outputs: name one for each")
        return np.full((len(frame), len(classes)), np.nan)
    # columns that are called as the classes are found by name, others stand in the head's order
    names = list(classes) if set(label) == set(classes) else list(label)
    single = _flag if likelihood == "bernoulli" else _number
    columns = [_parsed(frame[name], name, lambda value: [single(value)], 1, problems) for name in names]
    return np.concatenate(columns, axis=1)


def class_indices(
    values: "pd.Series[Any]", column: str, classes: Sequence[str], problems: list[str]
) -> npt.NDArray[np.int64]:
    """Labels as positions in `classes`; those that are none are added to the problems, with their counts."""
    positions = _positions(classes)
    raw = values.tolist()
    labels = [_class_index(value, positions) for value in raw]
    strange = Counter(repr(value)[:LONGEST] for value, label in zip(raw, labels, strict=True) if label is None)
    if strange:
        shown = ", ".join(f"{value} ({count:,} examples)" for value, count in strange.most_common(SHOWN))
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        problems.append(
            f"column '{column}' holds labels outside the head's {len(classes)} classes: {shown}{more}, the first in row "
            f"{labels.index(None) + 1}. "
            f"The classes are {quoted(list(classes))}, or 0 … {len(classes) - 1}; "
            "`labels` names them in the head's order"
        )
    return np.array([-1 if label is None else label for label in labels], dtype=np.int64)


def output_names(values: Sequence[Any], likelihood: Likelihood, where: str) -> list[str]:
    """Names of the outputs that a new head needs for a column of labels: classes, labels, or numbers by their places.

    Raises:
        TaskError: See `classes_among`.
    """
    if likelihood == "categorical":
        return classes_among(values, where)
    first = values[0] if len(values) else 0.0
    width = len(first) if hasattr(first, "__len__") and not isinstance(first, str) else 1
    if likelihood == "gaussian":
        return [str(number) for number in range(width)]
    entries = [entry for value in values for entry in (value if hasattr(value, "__len__") else [value])]
    flags = all(isinstance(entry, bool | float | np.bool_ | np.floating) for entry in entries)
    return [str(number) for number in range(width)] if flags else classes_among(entries, where, least=1)


def classes_among(values: Iterable[Any], where: str, *, least: int = 2) -> list[str]:
    """The classes that labels are of, sorted: names, or numbers from 0 to the highest.

    Args:
        values: Labels.
        where: What holds them, for messages.
        least: How many classes are needed.

    Raises:
        TaskError: Some are neither, or there are fewer classes.
    """
    distinct = {value.item() if isinstance(value, np.generic) else value for value in values}
    if distinct and all(isinstance(value, str) and value for value in distinct):
        names = sorted(distinct)
    else:
        numbers = [value for value in distinct if isinstance(value, int | float) and value == value // 1 and value >= 0]
        if len(numbers) < len(distinct) or max(numbers, default=0) >= MAX_CLASSES:
            strange = sorted(repr(value)[:LONGEST] for value in distinct if value not in numbers)
            raise TaskError(
                f"{where} holds {', '.join(strange[:SHOWN]) or max(numbers)}: names of classes, or numbers from 0, are needed"
            )
        names = [str(number) for number in range(int(max(numbers, default=-1)) + 1)]
    if len(names) < least:
        raise TaskError(f"{where} holds {len(names)} class{'es' * (not names)}: there is nothing to tell apart")
    return names


def nothing_to_measure(labels: npt.NDArray[Any], classes: Sequence[str]) -> list[str]:
    """What is wrong with labels that are the same for all examples."""
    if len(np.unique(labels, axis=0)) > 1:
        return []
    if labels.ndim == 1:
        same = f"the label '{classes[labels[0]]}'"
    else:
        same = f"the labels {labels[0].tolist()}"[:LONGEST]
    return [f"all {len(labels)} examples have {same}: nothing can be measured"]


def quoted(names: Sequence[str]) -> str:
    """Names in a message."""
    shown = ", ".join(f"'{str(name)[:LONGEST]}'" for name in names[:20])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 20 else shown


def _positions(classes: Sequence[str]) -> dict[str | int, int]:
    """What stands for a class → its position: its name, and a number that is no name."""
    positions: dict[str | int, int] = {name: index for index, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        return positions | {index: index for index in range(len(classes))}
    # numbers among the names: an integer that is read from a CSV is a name then
    return positions | {int(name): index for name, index in positions.items() if str(name).isdecimal()}


def _class_index(value: Any, positions: Mapping[str | int, int]) -> int | None:
    """The class that a name, or an integer stored as any type of number, stands for."""
    if isinstance(value, str):
        return positions.get(value)
    return positions.get(int(value)) if isinstance(value, int | float) and value == value // 1 else None


def _parsed(
    values: "pd.Series[Any]", column: str, parse: Callable[[Any], list[float]], width: int, problems: list[str]
) -> Floats:
    """A column's values, each as `width` numbers; the first that is none is told, and how many there are."""
    rows: list[list[float]] = []
    wrong: list[str] = []
    for number, value in enumerate(values.tolist(), start=1):
        try:
            rows.append(parse(value))
        except ValueError as error:
            shown = value.tolist() if isinstance(value, np.ndarray) else value
            wrong.append(f"{repr(shown)[:LONGEST]} in row {number}: {error}")
            rows.append([np.nan] * width)
    if wrong:
        problems.append(f"column '{column}' holds {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    return np.array(rows, np.float64)


def _parser(classes: Sequence[str], likelihood: Likelihood) -> Callable[[Any], list[float]]:
    """One value as a number for each of the head's outputs; it raises ValueError."""
    count = len(classes)
    if likelihood == "gaussian":
        return lambda value: [_number(value)] if count == 1 else [_number(one) for one in _entries(value, count)]
    positions = _positions(classes)

    def label_set(value: Any) -> list[float]:
        if count == 1 and not hasattr(value, "__len__"):
            return [_flag(value)]
        entries = _entries(value)
        if entries and all(isinstance(entry, bool | float) for entry in entries):
            return [_flag(entry) for entry in _entries(entries, count)]
        indices = [None if isinstance(entry, bool) else _class_index(entry, positions) for entry in entries]
        if None in indices:
            raise ValueError(
                f"{repr(entries[indices.index(None)])[:LONGEST]} is none of the head's {count} classes ({quoted(classes)}, or "
                f"0 … {count - 1}); `labels` names them in the head's order"
            )
        if len(set(indices)) < len(indices):
            raise ValueError(
                "a class is named twice. A list holds names or positions; flags, one for each class, are stored as true and "
                "false, or as floating-point numbers"
            )
        return [float(index in indices) for index in range(count)]

    return label_set


def _entries(value: Any, count: int | None = None) -> list[Any]:
    """A list's entries, `count` of them where that is given."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        raise ValueError(
            "a list is needed (Parquet, JSON lines), or `label` names a column for each of the head's outputs"
        )
    entries = value.tolist() if isinstance(value, np.ndarray) else list(value)
    if count is not None and len(entries) != count:
        raise ValueError(f"the head has {count} outputs")
    return entries


def _flag(value: Any) -> float:
    """0 or 1."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise ValueError("0 or 1, true or false is needed")


def _number(value: Any) -> float:
    """A finite number."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = np.inf
        if np.isfinite(number):
            return number
    raise ValueError("a finite number is needed")
