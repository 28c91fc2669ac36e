"""Byte ranges of a remote file on their way: neighbours in one request, several requests at once, memory bounded."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

from merging.errors import StorageError
from merging.io import storage

REQUEST = 8 << 20
"""Bytes of a request, where there are as many to read; longer ranges are cut into such pieces."""
GAP = 1 << 16
"""Bytes that nobody asked for and that are read all the same, to save a request."""
AHEAD = 4 * REQUEST
"""Bytes that may be under way, or wait to be taken, before the next request of one `prefetch` starts."""
CONNECTIONS = 16
"""Requests under way at once in this process, for all files."""

Span = tuple[int, int]


class Window:
    """What is being read of one remote file, from any thread.

    Args:
        path: The file's address.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._coming: dict[Span, tuple[_Group, _Line]] = {}

    def __reduce__(self) -> tuple[type["Window"], tuple[str]]:
        """Copies that travel to other processes have read nothing."""
        return Window, (self._path,)

    def prefetch(self, spans: Sequence[Span]) -> None:
        """Says that spans are about to be taken, best in this order; the first requests start now.

        Args:
            spans: Pairs of first byte and end.
        """
        with self._lock:
            groups = _grouped([span for span in spans if span not in self._coming])
            line = _Line(groups)
            self._coming |= {span: (group, line) for group in groups for span in group.spans}
            line.advance(self._path)

    def take(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop), in memory of their own; at once if they have come.

        Raises:
            StorageError: The file is missing, unreadable or shorter.
        """
        with self._lock:
            group, line = self._coming.pop((start, stop), (None, None))
            if group is None or line is None:
                group = _Group([(start, stop)])
            group.start(self._path)
        try:
            return group.take((start, stop), self._path)
        finally:
            if line is not None:
                with self._lock:
                    group.waiting -= stop - start
                    line.advance(self._path)


def download(path: str, target: Path) -> None:
    """Copies a remote file to a local one, in pieces.

    Raises:
        StorageError: The file is missing or unreadable.
        OSError: There is no right or no space to write.
    """
    end = storage.size(path)
    spans = [(start, min(start + REQUEST, end)) for start in range(0, end, REQUEST)]
    window = Window(path)
    window.prefetch(spans)
    with target.open("wb") as file:
        for span in spans:
            file.write(window.take(*span))


class _Group:
    """Neighbouring spans that come together: at most a request long, or one longer span."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.waiting = sum(stop - start for start, stop in spans)
        """Bytes that nobody has taken yet."""
        self._pieces: list[Future[bytes]] | None = None

    def start(self, path: str) -> None:
        """Sends the requests, unless they were sent before."""
        if self._pieces is None:
            first, last = self.spans[0][0], self.spans[-1][1]
            self._pieces = [
                _connections().submit(storage.read_bytes, path, start, min(start + REQUEST, last))
                for start in range(first, last, REQUEST)
            ]

    def take(self, span: Span, path: str) -> bytearray:
        """A span's bytes."""
        assert self._pieces is not None
        first = self.spans[0][0]
        start, stop = span[0] - first, span[1] - first
        out = bytearray(stop - start)
        filled = 0
        for number, piece in enumerate(self._pieces):
            begins = number * REQUEST
            part = memoryview(piece.result())[max(start - begins, 0) : max(stop - begins, 0)]
            out[filled : filled + len(part)] = part
            filled += len(part)
        if filled != stop - start:
            raise StorageError(f"{path} ends before byte {span[1]:,}: copy the file again")
        return out


class _Line:
    """Groups that one `prefetch` asked for, of which some are under way."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._later = deque(groups)
        self._under_way: list[_Group] = []

    def advance(self, path: str) -> None:
        """Starts groups until enough bytes are under way."""
        self._under_way = [group for group in self._under_way if group.waiting]
        waiting = sum(group.waiting for group in self._under_way)
        while self._later and (not waiting or waiting + self._later[0].waiting <= AHEAD):
            group = self._later.popleft()
            if group.waiting:  # else somebody took it out of turn
                group.start(path)
                self._under_way.append(group)
                waiting += group.waiting


def _grouped(spans: Sequence[Span]) -> list[_Group]:
    """Runs of neighbours that together are at most a request long, or one longer span."""
    groups: list[list[Span]] = []
    for start, stop in spans:
        last = groups[-1] if groups else None
        if last is not None and 0 <= start - last[-1][1] <= GAP and stop - last[0][0] <= REQUEST:
            last.append((start, stop))
        else:
            groups.append([(start, stop)])
    return [_Group(group) for group in groups]


@cache
def _connections() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="mergequest-ranges")
