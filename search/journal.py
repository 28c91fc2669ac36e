"""Optuna's journal, a JSON entry a line, as one process reads and writes it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from optuna.storages.journal import BaseJournalBackend

from merging.errors import StorageError
from merging.io import atomic, storage


class Lines(BaseJournalBackend):
    """A journal in memory, line by line as in a journal file."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = list(lines)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The entries from one on."""
        yield from map(json.loads, self._lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds entries."""
        self._lines += [json.dumps(log, separators=(",", ":")) for log in logs]


class Journal(Lines):
    """A journal file that one process writes, which does not read again what it has read, nor force it to disk.

    Optuna's own opens the file for a dozen lines a candidate, forces each for as long as the disk takes, and reads it
    again. What must not be lost is in the ledger; a journal that a power failure cuts is completed from there.

    Args:
        file: Where entries go.
        lines: What is there already.
    """

    def __init__(self, file: IO[bytes], lines: Iterable[str] = ()) -> None:
        super().__init__(lines)
        self.file = file
        self._forgotten = 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The entries from one on; those before it are not asked for again."""
        self._lines = self._lines[log_number_from - self._forgotten :]
        self._forgotten = log_number_from
        yield from map(json.loads, self._lines)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds entries, all in one write.

        Raises:
            StorageError: There is no right or no space to write.
        """
        known = len(self._lines)
        super().append_logs(logs)
        try:
            self.file.write("".join(f"{line}\n" for line in self._lines[known:]).encode())
        except OSError as error:
            raise StorageError(f"cannot write the study's journal: {error.strerror}") from error


def whole_lines(path: str) -> list[str]:
    """The lines of a journal up to its last whole one, from which it is cut off; none where it is missing or no text."""
    data = storage.read_bytes(path) if storage.exists(path) else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        atomic.write_bytes(path, whole)
    return whole.decode(errors="replace").splitlines()


def appended(path: str) -> IO[bytes]:
    """A file to be written at its end, at once.

    Raises:
        StorageError: There is no right to.
    """
    try:
        return Path(path).open("ab", buffering=0)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
