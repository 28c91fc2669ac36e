"""A local file written around the page cache: the kernel copies nothing, and takes no pages from what is read."""

import errno
import fcntl
import mmap
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 4096
"""Bytes: file systems take what is not buffered in whole blocks, from memory aligned to them."""
STAGED = 1 << 20
"""Bytes copied to aligned memory at a time, where a caller's are not."""


class UnbufferedFile:
    """A new file that any number of threads write to, each byte once and in any order.

    Blocks go to the disk as they come; a block that several writes share waits in memory until all of it is there. On a
    file system that only writes through the page cache, so it is written.

    Args:
        path: Where there is no file yet.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._size = 0
        self._shared: dict[int, _Block] = {}
        self._lock = threading.Lock()
        self._own = threading.local()
        self._direct = False
        with suppress(OSError, AttributeError):  # a file system, or a system, without
            fcntl.fcntl(self._handle, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
            self._direct = True

    def reserve(self, size: int) -> None:
        """Takes the space of the whole file, where the file system can do so.

        Raises:
            OSError: There is not enough.
        """
        self._size = size
        try:
            os.posix_fallocate(self._handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def write(self, place: int, data: memoryview) -> None:
        """Writes bytes to `place`; without a copy, if they lie in memory at that distance from a block's start, too.

        Raises:
            OSError: They cannot be written.
        """
        lead = min(-place % BLOCK, len(data))
        body = (len(data) - lead) // BLOCK * BLOCK
        self._share(place, data[:lead])
        self._write_blocks(place + lead, data[lead : lead + body])
        self._share(place + lead + body, data[lead + body :])

    def finish(self) -> None:
        """Writes what waits, the end of the file, and makes all durable.

        Raises:
            OSError: That failed.
        """
        self._buffer()
        for number, block in self._shared.items():
            start = number * BLOCK
            self._write_all(start, memoryview(block.page)[: max(self._size - start, 0)])
        os.fsync(self._handle)

    def close(self) -> None:
        """Gives the file back to the system."""
        os.close(self._handle)

    def _share(self, place: int, data: memoryview) -> None:
        """Adds some bytes to a block, and writes it once it is whole."""
        if not data:
            return
        number, offset = divmod(place, BLOCK)
        with self._lock:
            block = self._shared.setdefault(number, _Block(mmap.mmap(-1, BLOCK)))
            block.page[offset : offset + len(data)] = data
            block.filled += len(data)
            whole = block.filled == BLOCK
            if whole:
                del self._shared[number]
        if whole:
            self._write_all(number * BLOCK, memoryview(block.page))

    def _write_blocks(self, place: int, data: memoryview) -> None:
        """Writes whole blocks, by way of aligned memory if they are not there."""
        if not data:
            return
        if not self._direct or np.frombuffer(data, np.uint8).ctypes.data % BLOCK == 0:
            self._write_all(place, data)
            return
        if not hasattr(self._own, "staging"):
            self._own.staging = memoryview(mmap.mmap(-1, STAGED))
        for start in range(0, len(data), STAGED):
            piece = data[start : start + STAGED]
            staged = self._own.staging[: len(piece)]
            staged[:] = piece
            self._write_all(place + start, staged)

    def _write_all(self, place: int, data: memoryview) -> None:
        """All of `data`, however many calls it takes: one writes 2 GiB at most."""
        while data:
            direct = self._direct
            try:
                written = os.pwrite(self._handle, data, place)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._buffer()  # blocks are larger here
                continue
            data, place = data[written:], place + written

    def _buffer(self) -> None:
        """Goes on through the page cache."""
        fcntl.fcntl(self._handle, fcntl.F_SETFL, os.O_RDWR)
        self._direct = False


@dataclass
class _Block:
    """A block that several writes share: its bytes so far, and how many there are."""

    page: mmap.mmap
    filled: int = 0
