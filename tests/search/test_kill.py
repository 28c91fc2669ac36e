import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from search.ledger.ledger import Ledger

ROOT = Path(__file__).parents[2]
NOW = datetime(2031, 1, 1, tzinfo=UTC)
KILLS, CANDIDATES = 50, 70


def rows_of(directory):
    rows = Ledger(str(directory / "ledger")).rows()
    return [repr(replace(row, started=NOW, finished=NOW)) for row in rows], rows


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_leaves_the_rows_of_an_unbroken_one(tmp_path):
    script = Path(__file__).with_name("kill_and_resume.py")
    arguments = [tmp_path, CANDIDATES, KILLS, 1, "tpe"]
    result = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    hits = int(result.stdout.split()[-1])  # how many drivers died before they were done
    assert hits >= KILLS // 2
    unbroken, _ = rows_of(tmp_path / "unbroken")
    broken, rows = rows_of(tmp_path / "broken")
    assert len(unbroken) == CANDIDATES
    assert broken == unbroken
    # A row costs one evaluation; beyond that each kill may cost the one that was under way.
    evaluated = (tmp_path / "broken" / "evaluated.txt").read_text().split()
    complete = [row.candidate for row in rows if row.status == "complete"]
    assert set(complete) == set(evaluated)
    assert len(complete) <= len(evaluated) <= len(complete) + hits
    frame = pd.read_parquet(tmp_path / "broken" / "ledger")
    assert not frame.duplicated(["candidate", "split"]).any()
