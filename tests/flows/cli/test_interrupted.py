"""Drivers that are killed and interrupted."""

import json
import os
import random
import signal
import time

import psutil
import pytest

from search.ledger.ledger import Ledger
from tests.flows.cli.running import computes, mergequest, offspring, rows_of, start, wait_for_rows


def identity(row):
    return row.candidate, row.split, row.origin, row.trial, row.objective, tuple(sorted(row.losses.items()))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_and_resumed_equals_unbroken(campaign_file, tmp_path):
    """One worker: `kill -9` at moments of a fixed seed loses no finished candidate, repeats none, changes nothing.

    Both campaigns read the same statistics, whose last bits depend on which process measured which examples.
    """
    search = {"candidates": 9, "methods": ["average", "ties", "fisher"]}
    settings = {"selection": {"mode": "all"}, "test": {"top": 1}, "resources": {"evaluators": 1}}
    file = str(campaign_file(search=search, statistics={"cache": str(tmp_path / "statistics")}, **settings))
    unbroken = start("run", file, "--out", str(tmp_path / "unbroken"))
    wait_for_rows(tmp_path / "unbroken" / "ledger", 1, unbroken)  # statistics are there; it ends beside the others
    moments = random.Random(0)
    ledger = tmp_path / "broken" / "ledger"
    for _ in range(2):
        seen = len(rows_of(ledger))
        broken = start("run", file, "--out", str(tmp_path / "broken"))
        wait_for_rows(ledger, seen + 1 + moments.randrange(4), broken)
        time.sleep(moments.random() / 5)
        finished = rows_of(ledger)
        family = offspring(broken)
        os.kill(broken.pid, signal.SIGKILL)
        broken.communicate()
        # Ray's agents and its log monitor take a minute longer to notice; what computes and what holds memory ends at once
        _, alive = psutil.wait_procs([process for process in family if computes(process)], timeout=60)
        assert not alive
        after = rows_of(ledger)
        assert all(identity(after[key]) == identity(row) for key, row in finished.items())
    resumed = start("resume", str(tmp_path / "broken"))
    for process in (resumed, unbroken):
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    first, second = (
        sorted(map(identity, Ledger(str(tmp_path / name / "ledger")).rows()), key=str)
        for name in ("unbroken", "broken")
    )
    assert first == second
    assert json.loads(mergequest("status", tmp_path / "broken", "--json")[0])["state"] == "finished"


@pytest.mark.slow
def test_an_interruption_leaves_a_campaign_that_resumes(campaign_file, tmp_path):
    search = {
        "candidates": 5000,
        "sampler": "random",
        "methods": ["average", "ties"],
        "patience": None,
    }  # more than it will do
    settings = {"selection": {"mode": "all"}, "test": {"top": 1}, "resources": {"evaluators": 1}}
    file = str(campaign_file(search=search, **settings))
    process = start("run", file, "--out", str(tmp_path / "out"))
    wait_for_rows(tmp_path / "out" / "ledger", 8, process)
    family = offspring(process)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output.replace("\n", " ")
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert not list((tmp_path / "out").rglob("*.tmp"))
    rows = len(Ledger(str(tmp_path / "out" / "ledger")).rows())
    output, status = mergequest("status", tmp_path / "out")
    assert status == 0
    assert "unfinished" in output
    again = start("resume", str(tmp_path / "out"), "--candidates", "12")
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert len(Ledger(str(tmp_path / "out" / "ledger")).rows()) > rows
