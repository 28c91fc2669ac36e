import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from merging.io import direct_io
from merging.io.direct_io import BLOCK, STAGED, UnbufferedFile

SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17, 2 * STAGED + 3 * BLOCK + 5)


@pytest.fixture(params=["disk", "memory", "cached"])
def directory(request, tmp_path, monkeypatch):
    """A disk; a file system in memory; and a system that knows no other way than its page cache."""
    if request.param == "memory":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no file system in memory here")
        place = Path("/dev/shm") / f"unbuffered-{os.getpid()}-{tmp_path.name}"
        place.mkdir()
        yield place
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
        return
    if request.param == "cached":
        monkeypatch.delattr(os, "O_DIRECT")
    yield tmp_path


def aligned(data, place):
    """A copy in memory at the same distance from a block's start as in the file."""
    room = np.empty(len(data) + 2 * BLOCK, np.uint8)
    skip = (place - room.ctypes.data) % BLOCK
    room[skip : skip + len(data)] = data
    return room[skip : skip + len(data)]


def written(path, content, pieces, threads=1):
    file = UnbufferedFile(path)
    try:
        file.reserve(len(content))
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(lambda piece: file.write(piece[0], piece[1].data), pieces))
        file.finish()
    finally:
        file.close()
    return np.fromfile(path, np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lie", ["anywhere", "aligned"])
def test_a_file_is_what_was_written_in_any_order_by_any_thread(directory, size, lie):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    chance = random.Random(size)
    cuts = sorted({0, size, *(chance.randrange(size + 1) for _ in range(12))})
    pieces = [(start, content[start:stop]) for start, stop in pairwise(cuts)]
    if lie == "aligned":
        pieces = [(start, aligned(data, start)) for start, data in pieces]
    chance.shuffle(pieces)
    for threads in (1, 4):
        path = directory / f"{size}-{threads}"
        assert np.array_equal(written(path, content, pieces, threads), content)


def test_blocks_that_a_file_system_refuses_go_through_the_page_cache(tmp_path, monkeypatch):
    """As on one with larger blocks: what is written from an address or to a place between them is refused."""
    monkeypatch.setattr(direct_io, "BLOCK", 256)
    content = np.random.default_rng(0).integers(0, 256, 9000, dtype=np.uint8)
    pieces = [(4096, content[4096:]), (100, content[100:4096]), (0, content[:100])]
    assert np.array_equal(written(tmp_path / "file", content, pieces), content)


def test_there_must_be_room_for_a_file(tmp_path):
    file = UnbufferedFile(tmp_path / "file")
    with pytest.raises(OSError, match="large"):
        file.reserve(1 << 60)
    file.close()
    with pytest.raises(FileExistsError):
        UnbufferedFile(tmp_path / "file")
