"""A pool that is read by several tasks is the pool that one process reads."""

import pytest

from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import check_weights, distances, recall
from merging.io import fact_cache, storage
from ray_tasks.jobs.check_weights import PoolPaths, examine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def test_tasks_find_what_one_process_finds(tiny_pool, monkeypatch):
    monkeypatch.setattr(storage, "SETTLED", -60.0)
    monkeypatch.setattr("merging.checkpoints.validation.SLICE", 2)
    monkeypatch.setattr(fact_cache, "_facts", {})
    members = {name: str(tiny_pool[name]) for name in ("one", "two", "three")}
    pool = Pool.open(str(tiny_pool["base"]), members)
    parts = list(examine(pool, PoolPaths(str(tiny_pool["base"]), members, ()), list(members)))
    assert sorted(sorted(part) for part in parts) == [["one"], ["three", "two"]]
    result = {name: finding for part in parts for name, finding in part.items()}
    assert recall(pool) == {}  # findings are kept by who asked
    assert pool.base.is_recognised
    assert all(member.checkpoint.is_recognised for member in pool.members.values())
    assert distances(pool, result) == check_weights(Pool.open(str(tiny_pool["base"]), members))
