"""The record of every candidate: a directory of Parquet files, each written whole, each row in one of them."""

import io
import json
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from merging.errors import LedgerError, MergequestError
from merging.io import addresses, atomic, storage
from merging.io.documents import as_object, parse_json
from search.ledger.row import READABLE, SCHEMA, VERSION, Origin, Row, Status

VERSION_KEY = b"mergequest.ledger"
READERS = 16
UNREADABLE = (
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""What Arrow and Python raise of a file that was changed, wherever its bytes no longer fit each other."""
ROWS_PER_FILE = 512
"""A file is full with so many rows: what an append rewrites is bounded, and so is the number of files."""
MAPS = tuple(field.name for field in SCHEMA if pa.types.is_map(field.type))
TIMES = tuple(field.name for field in SCHEMA if pa.types.is_timestamp(field.type))


class Ledger:
    """The rows of a campaign, on disk and in memory. One process appends; any number may read the directory.

    An append replaces the newest file by one with the new rows too, in one rename (or one put), until that file
    is full and the next one begins. Small files thus grow into large ones without a moment at which a row is in
    two files or in none, and no file that a reader has listed is ever taken away: `pandas.read_parquet(path)`
    finds every finished row once, at any moment. A process begins a file of its own and never touches what
    another one wrote. A candidate that failed and was measured again has a row of each attempt; the latest
    counts. Temporary files begin with a dot, which Arrow's dataset readers skip.

    Args:
        path: The directory, local or at any fsspec address; it need not exist yet.
        campaign: The campaign that it must belong to; None to read whatever is there.
        retry_failed: Whether failed rows count as not there, so that their candidates are measured again.

    Raises:
        LedgerError: A file is unreadable or of another schema version, or rows belong to another campaign.
    """

    def __init__(self, path: str, campaign: str | None = None, *, retry_failed: bool = False) -> None:
        self.path = path
        self._campaign = campaign
        self._rows: dict[tuple[str, str], Row] = {}
        self._files, self._newest = 0, SCHEMA.empty_table()
        self._mine = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        names = [
            name for name in storage.list_dir(path) if name.endswith(".parquet") and not name.startswith((".", "_"))
        ]
        with ThreadPoolExecutor(READERS) as readers:
            every = [row for rows in readers.map(self._read, names) for row in rows]
        for row in sorted(every, key=lambda row: (row.finished, row.trial or 0)):
            self._check(row)
            earlier = self._rows.get(key := (row.candidate, row.split))
            if earlier is None or earlier.status == "failed":
                self._rows.pop(key, None)  # to its place in time
                self._rows[key] = row
        failed = [key for key, row in self._rows.items() if row.status == "failed"] if retry_failed else []
        self._retried = {key: self._rows.pop(key) for key in failed}

    @property
    def retried(self) -> list[Row]:
        """The failed rows that count as not there, until their candidates have new ones."""
        return list(self._retried.values())

    def append(self, row: Row) -> bool:
        """Makes a row durable before returning, as `extend` does.

        Returns:
            Whether the row is new.
        """
        return bool(self.extend([row]))

    def extend(self, rows: Iterable[Row]) -> list[Row]:
        """Makes rows durable in one write; a (candidate, split) that is there already, and counts, is left as it is.

        Returns:
            Those that are new.

        Raises:
            LedgerError: One belongs to another campaign; none is written.
            StorageError: There is no right or no space to write.
        """
        new: dict[tuple[str, str], Row] = {}
        for row in rows:
            self._check(row)
            if (key := (row.candidate, row.split)) not in self._rows:
                new.setdefault(key, row)
        if not new:
            return []
        whole = pa.concat_tables([self._newest, to_table(new.values())]).combine_chunks()
        sink = io.BytesIO()
        pq.write_table(whole, sink, compression="zstd", write_statistics=False, write_page_checksum=True)
        atomic.write_bytes(addresses.join(self.path, f"{self._mine}-{self._files:06d}.parquet"), sink.getvalue())
        self._newest = whole
        if len(whole) >= ROWS_PER_FILE:
            self._files, self._newest = self._files + 1, SCHEMA.empty_table()
        self._rows |= new
        for key in new:
            self._retried.pop(key, None)
        return list(new.values())

    def get(self, candidate: str, split: str) -> Row | None:
        """The row of a candidate on a split, if there is one."""
        return self._rows.get((candidate, split))

    def has(self, candidate: str, split: str) -> bool:
        """Whether there is a row of a candidate on a split, whatever became of it."""
        return (candidate, split) in self._rows

    def rows(self) -> list[Row]:
        """All rows, each (candidate, split) once: those found at opening by time, then those appended."""
        return list(self._rows.values())

    def table(self) -> pa.Table:
        """`rows()` as an Arrow table of the ledger's schema."""
        return to_table(self._rows.values())

    def _check(self, row: Row) -> None:
        self._campaign = self._campaign or row.campaign
        if row.campaign != self._campaign:
            raise LedgerError(
                f"{self.path} holds the ledger of campaign '{row.campaign}', not of '{self._campaign}': "
                f"name another directory, or resume '{row.campaign}' there"
            )

    def _read(self, name: str) -> list[Row]:
        path = addresses.join(self.path, name)
        aside = "move it away to go on without its rows"
        try:
            raw = io.BytesIO(storage.read_bytes(path))
            table = pq.ParquetFile(raw, page_checksum_verification=True).read(use_threads=False)
            version = (table.schema.metadata or {}).get(VERSION_KEY, b"").decode()
        except UNREADABLE as error:
            raise LedgerError(f"{path} is not a readable Parquet file ({_reason(error)}); {aside}") from error
        if version not in READABLE:
            kind = f"a ledger of version {version}" if version else "not a ledger's file"
            raise LedgerError(
                f"{path} is {kind}, and this mergequest writes version {VERSION}: read it with pandas, "
                f"and give a new campaign another directory"
            )
        if strange := [field.name for field in table.schema if field not in list(SCHEMA)]:
            raise LedgerError(f"{path} has a column '{strange[0]}' that is none of a ledger's: it is damaged; {aside}")
        try:
            return from_table(table)
        except (MergequestError, *UNREADABLE) as error:
            raise LedgerError(f"{path} holds a row that is none ({_reason(error)}): it is damaged; {aside}") from error


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as an Arrow table of the ledger's schema."""
    records = []
    for row in rows:
        record: dict[str, Any] = {field.name: getattr(row, field.name) for field in fields(row)}
        record["members"] = list(row.members)
        record["parameters"] = json.dumps(dict(row.parameters), sort_keys=True)
        record["sampler"] = None if row.sampler is None else json.dumps(row.sampler, separators=(",", ":"))
        records.append(record | {name: list(record[name].items()) for name in MAPS})
    return pa.Table.from_pylist(records, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Row]:
    """The rows of a table that `to_table` made."""
    rows = []
    for record in table.to_pylist():
        record |= {name: dict(record.get(name) or {}) for name in MAPS}
        record |= {name: record[name].astimezone(UTC) for name in TIMES}
        record["members"] = tuple(record["members"])
        record["parameters"] = as_object(parse_json(record["parameters"], "`parameters`"), "`parameters`")
        if record.get("sampler") is not None:
            record["sampler"] = as_object(parse_json(record["sampler"], "`sampler`"), "`sampler`")
        for name in MAPS:
            if None in record[name].values():
                raise ValueError(f"`{name}` without a number")
        if record["status"] not in get_args(Status) or record["origin"] not in get_args(Origin):
            raise ValueError(f"status '{record['status']}' and origin '{record['origin']}'")
        rows.append(Row(**record))
    return rows


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
