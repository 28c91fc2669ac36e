"""Evaluators die, nodes go and come: what the pool makes of it, with actors that only sleep or die when told to."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from merging.errors import ClusterError
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool, ray
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from ray_tasks.jobs.parallel import each

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class Light:
    """Sleeps or dies as the assignment says; cannot be built where `setup` says so."""

    def __init__(self, setup, threads):
        self._setup = setup

    def build(self):
        if self._setup == "broken":
            raise BrokenError("no such pool")

    def measure(self, assignment):
        started = datetime.now(UTC)
        if assignment.deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(assignment.deed)
        error = f"measured {assignment.ticket}"
        return SimpleNamespace(
            measurement=None,
            error=error,
            worker="",
            started=started,
            seconds=0.0,
            lost=False,
            unreachable=False,
            fault=False,
        )


class BrokenError(Exception):
    pass


def work(ticket, deed=0.0, candidate=None):
    return SimpleNamespace(ticket=ticket, deed=deed, candidate=candidate or object())


@pytest.fixture
def make_pool(local_ray):
    pools = []

    def make(evaluators, seconds=None, **changes):
        group = EvaluatorGroup(evaluators=evaluators, **({"setup": None, "threads": 0, "kind": Light} | changes))
        pools.append(EvaluatorPool(group, seconds))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def until(condition, pool, seconds=60.0):
    """What finished until the condition held."""
    finished, deadline = [], time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        finished += pool.wait(0.5)
    assert condition()
    return finished


def run_one(pool, assignment):
    """Hands over when somebody is free, and waits until it is back."""
    until(lambda: pool.free, pool)
    pool.submit(assignment)
    finished = []
    while not finished:
        finished = pool.wait(5.0)
    return finished[0]


def test_a_crash_loop_is_an_error_but_crashes_between_answers_are_not(make_pool):
    pool = make_pool(1, restarts=1)
    pool.start()
    for deed in ("die", 0.0, "die", 0.0):
        done = run_one(pool, work("x", deed))
        assert done.lost == (deed == "die")
    assert run_one(pool, work("x", "die")).lost
    assert run_one(pool, work("x", "die")).lost
    with pytest.raises(ClusterError, match=r"died 2 times in a row, the last one so: ActorDiedError"):
        pool.wait(1.0)


def test_one_candidate_that_ends_its_evaluators_is_no_crash_loop(make_pool):
    """Tried again and again, it counts once: the candidates after it are measured by a single evaluator, too."""
    pool = make_pool(1, restarts=1)
    pool.start()
    for number in range(4):
        assert run_one(pool, work(f"again {number}", "die", candidate="killer")).lost
    assert not run_one(pool, work("sound")).lost
    assert run_one(pool, work("last", "die", candidate="killer")).lost


def test_evaluators_without_room_are_not_counted_and_hold_nobody_up(make_pool):
    cpus = int(ray.cluster_resources()["CPU"])
    pool = make_pool(cpus + 2, threads=1)
    started = time.monotonic()
    assert pool.start(grace=3.0) == pool.there == cpus
    assert time.monotonic() - started < 60
    for number in range(cpus):
        pool.submit(work(str(number), 0.1))
    assert len(until(lambda: not pool.at_work, pool)) == cpus


def test_no_room_at_all_is_an_error_after_a_while_and_is_said_before(make_pool, monkeypatch):
    monkeypatch.setattr("ray_tasks.evaluators.lifecycle.SILENCE", 1.0)
    monkeypatch.setattr("ray_tasks.evaluators.lifecycle.LOOK", 0.5)
    said = []
    pool = make_pool(1, threads=1000, say=said.append)
    with pytest.raises(ClusterError, match="no evaluator could start within 3 s"):
        pool.start(timeout=3.0)
    assert "waiting for room on the cluster" in said[0]


def test_a_cluster_that_grows_is_used(make_pool, monkeypatch):
    monkeypatch.setattr("ray_tasks.evaluators.lifecycle.LOOK", 0.1)
    said, room = [], [1]
    pool = make_pool(1, room=lambda: room[0], say=said.append)
    assert pool.start() == 1
    room[0] = 3
    until(lambda: pool.there == 3, pool)
    assert said[-1] == "the cluster grew: 3 evaluators instead of 1"
    room[0] = 1  # who is there stays
    for number in range(3):
        pool.submit(work(str(number), 0.0))
    assert len(until(lambda: not pool.at_work, pool)) == 3


def test_one_that_cannot_be_built_is_an_error_only_where_none_could(make_pool, monkeypatch):
    with pytest.raises(BrokenError):
        make_pool(1, setup="broken").start()
    monkeypatch.setattr("ray_tasks.evaluators.lifecycle.LOOK", 0.1)
    pool = make_pool(1, restarts=0)
    pool.start()
    pool.group.setup, pool.group.evaluators = "broken", 2
    pool.submit(work("long", 3.0))
    assert [done.error for done in until(lambda: not pool.at_work, pool)] == ["measured long"]
    assert pool.there == 1


def test_evaluators_go_on_while_the_driver_looks_away(make_pool):
    pool = make_pool(2)
    pool.start()
    for number in range(pool.capacity):
        pool.submit(work(str(number), 0.2))
    time.sleep(2.0)
    assert sorted(done.ticket for done in pool.wait(0.0)) == ["0", "1", "2", "3"]
    alone = make_pool(1)
    alone.start()
    assert alone.capacity == 1


def test_what_waits_for_its_turn_has_no_part_in_what_befalls_its_evaluator(make_pool):
    pool = make_pool(2, seconds=2.0)
    pool.start()
    for ticket, deed in (("hangs", 60.0), ("dies", "die"), ("x", 1.2), ("y", 1.2)):
        pool.submit(work(ticket, deed))
    result = {done.ticket: done for done in until(lambda: not pool.at_work and pool.there == 2, pool)}
    assert result["hangs"].error.startswith("TimeoutError: not measured within 2 s")
    assert result["dies"].lost
    assert [(result[ticket].error, result[ticket].lost) for ticket in "xy"] == [
        ("measured x", False),
        ("measured y", False),
    ]
    for number in range(4):  # two of them take 2.4 s at an evaluator, each by itself less than the limit
        pool.submit(work(str(number), 1.2))
    assert {done.error for done in until(lambda: not pool.at_work, pool)} == {f"measured {n}" for n in range(4)}


def test_nobody_waits_behind_a_straggler_while_another_is_idle(make_pool):
    pool = make_pool(2)
    pool.start()
    for ticket, deed in (("straggler", 6.0), ("quick", 0.0), ("behind", 0.0), ("beside", 0.0)):
        pool.submit(work(ticket, deed))
    order = [done.ticket for done in until(lambda: not pool.at_work, pool)]
    assert sorted(order) == ["behind", "beside", "quick", "straggler"]
    assert order[-1] == "straggler"


def test_calls_run_beside_evaluators_that_hold_every_cpu(make_pool):
    make_pool(int(ray.cluster_resources()["CPU"]), threads=1).start()
    seen = []

    def call(number, report):
        report(0.5)
        return number

    calls = {str(number): (number,) for number in range(5)}
    assert dict(each(call, calls, progress=seen.append)) == {str(number): number for number in range(5)}
    assert seen[-1] <= 1.0


def test_nodes_that_are_lost_and_nodes_that_come():
    script = Path(__file__).with_name("lose_nodes.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(
        prefix="mq", dir="/tmp", ignore_cleanup_errors=True
    ) as scratch:  # short: for sockets
        done = subprocess.run(
            [sys.executable, script, scratch], env=environment, capture_output=True, text=True, timeout=280, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "answers 12 of 12, lost 0" in said
    assert any(line.endswith("waiting for room on the cluster. A node was lost.") for line in said)
    assert "the cluster grew: 2 evaluators instead of 1" in said
