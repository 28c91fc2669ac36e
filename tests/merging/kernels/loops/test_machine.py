import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from merging.kernels.loops import machine
from merging.kernels.loops.compiling import machine_code

LOOK = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
from merging.kernels.blockwise import is_finite
with ThreadPoolExecutor(8) as threads:  # all of which find nothing loaded
    print(set(threads.map(is_finite, [torch.ones(9)] * 64)), is_finite(torch.full((9,), float("nan"))), "numba" in sys.modules)
"""


def start(cache: Path, **changes: str) -> subprocess.Popen[str]:
    """A process that asks for a loop, with a cache directory of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, "-c", LOOK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache directory without loops, in which this process finds what it keeps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def kept(cache: Path) -> Path:
    (result,) = cache.rglob("reductions.largest")
    return result


@pytest.mark.slow
def test_of_several_processes_one_compiles_and_later_ones_need_no_numba(tmp_path):
    together = [said(process) for process in [start(tmp_path) for _ in range(3)]]
    assert sorted(together) == ["{True} False False", "{True} False False", "{True} False True"]
    assert not list(tmp_path.rglob("*.largest.*"))
    assert said(start(tmp_path)) == "{True} False False"


@pytest.mark.slow
def test_damaged_code_is_made_anew(tmp_path):
    assert said(start(tmp_path)) == "{True} False True"
    file = kept(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert said(start(tmp_path)) == "{True} False True"
    assert len(file.read_bytes()) == len(whole)


def test_where_nothing_compiles_torch_merges_and_it_is_said_once(tmp_path):
    """As numba itself does beside a numpy that it does not know."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 1.2 or less')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = start(tmp_path / "cache", PYTHONPATH=path)
    out, error = process.communicate(timeout=120)
    assert out.strip() == "{True} False False"
    assert (
        error.count("UserWarning: the loop 'reductions.largest' cannot be compiled (ImportError: Numba needs NumPy")
        == 1
    )


def test_where_nothing_can_be_kept_loops_are_compiled_all_the_same(fresh):
    (fresh / "mergequest").write_text("a file where the directory should be")
    processor = machine._processor()
    assert processor is not None
    symbol, code = machine._made(processor, "reductions.largest")
    assert processor.address(symbol, code)
    assert machine._kept(processor, "reductions.largest") is None


def test_what_needs_memory_of_its_own_is_no_loop():
    def greedy(size: int) -> int:
        return np.ones(size).sum()

    processor = machine._processor()
    assert processor is not None
    with pytest.raises(RuntimeError, match="'greedy' would ask the process for"):
        machine_code(greedy, processor.target())
