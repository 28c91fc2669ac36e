import pytest

from merging.checkpoints.pool import Pool
from merging.errors import ClusterError
from merging.mergers.material import Material
from merging.mergers.shard_planning import place
from ray_tasks.sharded.placement import PROCESS_BYTES, Node, plan

ROOMY = [Node(10**10, 10**10), Node(10**10, 10**10)]


@pytest.fixture(scope="module")
def material(tiny_pool):
    return Material(
        Pool.open(str(tiny_pool["base"]), {name: str(path) for name, path in tiny_pool.items() if name != "base"})
    )


def test_a_plan_takes_as_many_shards_as_memory_asks_for(material):
    methods, entire = ["average"], place(material, ["average"], 1)[0].held_bytes
    assert len(plan(material, methods, ROOMY, evaluators=1).places) == 2
    assert len(plan(material, methods, ROOMY, evaluators=1, shards=5).places) == 5
    made = plan(material, methods, ROOMY, evaluators=1, shard_memory=PROCESS_BYTES + entire // 4)
    assert len(made.places) >= 4
    assert max(made.bundles) <= PROCESS_BYTES + entire // 4
    text = made.describe(["a", "b"] * (len(made.places) // 2) + ["a"] * (len(made.places) % 2))
    assert f"{len(made.places)} shards on 2 nodes" in text
    assert "a: shards 0, 2" in text


@pytest.mark.parametrize(
    ("nodes", "settings", "message"),
    [
        ([Node(10**8, 10**10)], {}, r"the pool's shards take .* and the nodes have 0\.1 GB"),
        ([Node(5 * 10**8, 10**10)], {"shards": 2}, "add nodes, set more resources.shards"),
        ([Node(10**10, 10**4)], {}, r"on their way to 3 evaluators take .* fewer resources.evaluators"),
        (ROOMY, {"shards": 1, "shard_memory": PROCESS_BYTES + 1}, "resources.shard_memory allows"),
        (ROOMY, {"shard_memory": PROCESS_BYTES + 1}, "resources.shard_memory allows"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_with_numbers(material, nodes, settings, message):
    with pytest.raises(ClusterError, match=message):
        plan(material, ["average"], nodes, evaluators=3, **settings)
