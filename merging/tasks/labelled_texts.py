"""Labelled texts from Parquet, CSV and JSON lines: read, checked, and turned into class indices."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from merging.errors import StorageError, TaskError
from merging.io import storage
from merging.io.documents import as_object, is_text, parse_json
from merging.tasks.task import IGNORED

FORMATS = (".parquet", ".csv", ".jsonl", ".ndjson")
SHOWN, LONGEST = 5, 100
"""Of a message: values, and characters of a value."""
BATCH = 1 << 16
"""Rows of a Parquet file that are read at once."""
MAX_TABLE = 8 << 30
"""Bytes of a table's columns."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a task reads."""

    text: str
    text_pair: str | None
    label: str | None

    @property
    def texts(self) -> list[str]:
        """Those that hold text."""
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]

    @property
    def all(self) -> list[str]:
        """All of them."""
        return [*self.texts, *([self.label] if self.label is not None else [])]


@dataclass(frozen=True)
class Examples:
    """A split's examples.

    Args:
        texts: One list for each text column, N strings each.
        labels: Class indices [N]; −100 where there are no labels.
    """

    texts: tuple[list[str], ...]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def read_examples(paths: Sequence[str], columns: Columns, classes: Sequence[str]) -> Examples:
    """Reads a split from one or more files, in the order given.

    Args:
        paths: Files, local or at any fsspec address; the suffix names the format.
        columns: Which columns to read.
        classes: The head's classes, in order. String labels are looked up here; integer labels are positions.

    Raises:
        TaskError: A file, column, text or label is missing or unusable; all bad rows are told at once.
    """
    frame = read_table(paths, columns.all, columns.texts)
    problems = [problem for column in columns.texts for problem in text_problems(frame[column], column)]
    labels = np.full(len(frame), IGNORED)
    if columns.label is not None:
        labels = class_indices(frame[columns.label], columns.label, classes, problems)
    if columns.label is not None and not problems and len(np.unique(labels)) < 2:
        problems.append(f"all {len(labels)} examples have the label '{classes[labels[0]]}': nothing can be measured")
    if problems:
        raise TaskError("; ".join(f"{', '.join(paths)}: {problem}" for problem in problems))
    return Examples(tuple(frame[column].tolist() for column in columns.texts), labels)


def read_table(paths: Sequence[str], columns: Sequence[str], texts: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of one or more files, in the order given.

    Args:
        paths: Files, local or at any fsspec address; the suffix names the format.
        columns: Which columns to read.
        texts: Those of them that hold text, whatever it looks like.

    Raises:
        TaskError: A file or column is missing or unusable, or there are no rows.
    """
    frame = pd.concat([_read_file(path, columns, texts) for path in paths], ignore_index=True)
    if frame.empty:
        raise TaskError(f"{', '.join(paths)}: there are no rows")
    return frame


def _read_file(path: str, columns: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    """The columns of one file, values as the file has them."""
    suffix = next((suffix for suffix in FORMATS if path.lower().endswith(suffix)), None)
    if suffix is None:
        raise TaskError(f"{path}: the format is not known; name a file that ends in {', '.join(FORMATS)}")
    try:
        raw = storage.read_bytes(path)
    except StorageError as error:
        raise TaskError(str(error)) from error
    try:
        if suffix == ".parquet":
            file = pq.ParquetFile(BytesIO(raw), page_checksum_verification=True)
            names = file.schema_arrow.names
            frame = _read_parquet(file, [name for name in columns if name in names]).to_pandas()
        elif suffix == ".csv":
            as_text: Any = dict.fromkeys(texts, str)
            # only an empty field is missing: "NA" and "null" are words that people write
            frame = pd.read_csv(BytesIO(raw), dtype=as_text, keep_default_na=False, na_values=[""])
            names = list(frame.columns)
        else:
            frame = _read_json_lines(raw.decode("utf-8-sig"))
            names = list(frame.columns)
    except (ValueError, OverflowError, OSError, MemoryError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise TaskError(f"{path} cannot be read as {suffix[1:]}: {reason}") from error
    if not names:
        raise TaskError(f"{path}: there are no rows")
    if missing := [name for name in columns if name not in names]:
        raise TaskError(f"{path} has no column {_quoted(missing)}; it has {_quoted(names)}")
    chosen: pd.DataFrame = frame[list(columns)]
    return chosen


def _read_parquet(file: pq.ParquetFile, columns: list[str]) -> pa.Table:
    """Columns of a Parquet file, in memory that is bounded: a few bytes of it can stand for any number of rows.

    Raises:
        ValueError: They are larger.
    """
    batches, size = [], 0
    for batch in file.iter_batches(BATCH, columns=columns):
        size += batch.nbytes
        if size > MAX_TABLE:
            raise ValueError(f"its columns have more than {MAX_TABLE >> 30} GiB")
        batch.validate(full=True)
        batches.append(batch)
    schema = file.schema_arrow
    return pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in columns]))


def _read_json_lines(text: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(as_object(parse_json(line, f"line {number}", whole_text=False), f"line {number}"))
            except StorageError as error:
                raise ValueError(str(error)) from error
    return pd.DataFrame(rows, dtype=object)


def text_problems(values: "pd.Series[Any]", column: str) -> list[str]:
    """What is wrong with a column of texts, the first bad row named."""
    wrong = [row for row, value in enumerate(values) if not is_text(value)]
    if not wrong:
        return []
    return [
        f"column '{column}' holds no text in {len(wrong)} of {len(values)} rows "
        f"(first in row {wrong[0] + 1}: {repr(values.iloc[wrong[0]])[:LONGEST]}); remove those rows or name another column"
    ]


def class_indices(
    values: "pd.Series[Any]", column: str, classes: Sequence[str], problems: list[str]
) -> npt.NDArray[np.int64]:
    """Labels as positions in `classes`; those that are none are added to the problems, with their counts."""
    positions: dict[str | int, int] = {name: index for index, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        positions |= {index: index for index in range(len(classes))}
    else:  # numbers among the names: an integer that is read from a CSV is a name then
        positions |= {int(name): index for name, index in positions.items() if str(name).isdecimal()}
    raw = values.tolist()
    labels = [_class_index(value, positions) for value in raw]
    strange = Counter(repr(value)[:LONGEST] for value, label in zip(raw, labels, strict=True) if label is None)
    if strange:
        shown = ", ".join(f"{value} ({count:,} examples)" for value, count in strange.most_common(SHOWN))
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        problems.append(
            f"column '{column}' holds labels outside the head's {len(classes)} classes: {shown}{more}. "
            f"The classes are {_quoted(list(classes))}, or 0 … {len(classes) - 1}; "
            "`labels` names them in the head's order"
        )
    return np.array([-1 if label is None else label for label in labels], dtype=np.int64)


def _class_index(value: Any, positions: Mapping[str | int, int]) -> int | None:
    """The class that a name, or an integer stored as any type of number, stands for."""
    if isinstance(value, str):
        return positions.get(value)
    return positions.get(int(value)) if isinstance(value, int | float) and value == value // 1 else None


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{str(name)[:LONGEST]}'" for name in names[:20])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 20 else shown
