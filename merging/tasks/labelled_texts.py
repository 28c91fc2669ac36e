"""Labelled texts from Parquet, CSV and JSON lines: read, checked, and their labels turned into numbers."""

from collections.abc import Sequence
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
from merging.tasks.labels import LONGEST, label_columns, nothing_to_measure, quoted, read_labels
from merging.tasks.likelihood import Likelihood

FORMATS = (".parquet", ".csv", ".jsonl", ".ndjson")
BATCH = 1 << 16
"""Rows of a Parquet file that are read at once."""
MAX_TABLE = 8 << 30
"""Bytes of a table's columns."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a task reads."""

    text: str
    text_pair: str | None
    label: str | Sequence[str] | None

    @property
    def texts(self) -> list[str]:
        """Those that hold text."""
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]

    @property
    def all(self) -> list[str]:
        """All of them."""
        return [*self.texts, *label_columns(self.label)]


@dataclass(frozen=True)
class Examples:
    """A split's examples.

    Args:
        texts: One list for each text column, N strings each.
        labels: Class indices [N]; −100 where there are no labels. Of several labels or numbers [N, C], and NaN.
        names: What each example is called in messages [N].
    """

    texts: tuple[list[str], ...]
    labels: npt.NDArray[Any]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)


def read_examples(
    paths: Sequence[str], columns: Columns, classes: Sequence[str], likelihood: Likelihood = "categorical"
) -> Examples:
    """Reads a split from one or more files, in the order given.

    Args:
        paths: Files, local or at any fsspec address; the suffix names the format.
        columns: Which columns to read.
        classes: The head's classes, in order. String labels are looked up here; integer labels are positions.
        likelihood: What the head's logits are parameters of.

    Raises:
        TaskError: A file, column, text or label is missing or unusable; all bad rows are told at once.
    """
    problems: list[str] = []
    parts = []
    tables = read_tables(paths, columns.all, columns.texts)
    for path, frame in tables:
        own = [problem for column in columns.texts for problem in text_problems(frame[column], column)]
        parts.append(read_labels(frame, columns.label, classes, likelihood, own))
        problems += [f"{path}: {problem}" for problem in own]
    labels = np.concatenate(parts)
    if columns.label is not None and not problems:
        problems += [f"{', '.join(paths)}: {problem}" for problem in nothing_to_measure(labels, classes)]
    if problems:
        raise TaskError("; ".join(problems))
    names = [f"{path}, row {row}" for path, frame in tables for row in range(1, len(frame) + 1)]
    texts = tuple([text for _, frame in tables for text in frame[column].tolist()] for column in columns.texts)
    return Examples(texts, labels, names)


def read_table(paths: Sequence[str], columns: Sequence[str], texts: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of one or more files, in the order given.

    Args:
        paths: Files, local or at any fsspec address; the suffix names the format.
        columns: Which columns to read.
        texts: Those of them that hold text, whatever it looks like.

    Raises:
        TaskError: A file or column is missing or unusable, or there are no rows.
    """
    return pd.concat([frame for _, frame in read_tables(paths, columns, texts)], ignore_index=True)


def read_tables(
    paths: Sequence[str], columns: Sequence[str], texts: Sequence[str] = ()
) -> list[tuple[str, pd.DataFrame]]:
    """`read_table`, file by file, for messages that name one; those without rows are left out."""
    frames = [(path, _read_file(path, columns, texts)) for path in paths]
    if all(frame.empty for _, frame in frames):
        raise TaskError(f"{', '.join(paths)}: there are no rows")
    return [(path, frame) for path, frame in frames if not frame.empty]


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
        raise TaskError(f"{path} has no column {quoted(missing)}; it has {quoted(names)}")
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
