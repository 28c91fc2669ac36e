import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from search.ledger import Ledger

ROOT = Path(__file__).parents[2]
KILLS = 25


def run(directory, kills, seed, sampler, candidates=40):
    script = Path(__file__).with_name("kill_and_resume.py")
    arguments = [directory, candidates, kills, seed, sampler]
    found = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    rows = Ledger(str(directory / "ledger")).rows()
    return [replace(row, started=rows[0].started, finished=rows[0].started) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "seed"), [("tpe", 1), ("tpe", 2), ("cmaes", 3)])
def test_a_search_that_is_killed_again_and_again_leaves_the_rows_of_an_unbroken_one(tmp_path, sampler, seed):
    unbroken = run(tmp_path / "unbroken", 0, seed, sampler)
    broken = run(tmp_path / "broken", KILLS, seed, sampler)
    assert len(unbroken) == 40
    assert broken == unbroken
    # A row costs one evaluation; beyond that each kill may cost the one that was under way.
    evaluated = (tmp_path / "broken" / "evaluated.txt").read_text().split()
    complete = [row.candidate for row in broken if row.status == "complete"]
    assert set(complete) == set(evaluated)
    assert len(complete) <= len(evaluated) <= len(complete) + KILLS
    frame = pd.read_parquet(tmp_path / "broken" / "ledger")
    assert not frame.duplicated(["candidate", "split"]).any()
