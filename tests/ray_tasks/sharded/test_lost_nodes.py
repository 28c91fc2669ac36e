"""What users are told of shards whose nodes are lost."""

import pytest

from ray_tasks.sharded.lost_nodes import SILENCE, NodeWatch

ALIVE = {"a": "10.0.0.1 (a)", "b": "10.0.0.2 (b)", "c": "10.0.0.3 (c)"}


@pytest.fixture
def said():
    return []


@pytest.fixture
def watch(said):
    return NodeWatch(["a", "b", "b"], said.append)


def without(*nodes):
    return {node: address for node, address in ALIVE.items() if node not in nodes}


def test_a_node_takes_two_shards_along_and_one_of_them_must_wait(watch, said):
    watch.look(["a", "b", "b"], ALIVE, 0.0)
    assert said == []
    watch.look(["a", "b", "b"], without("b"), 1.0)
    watch.look(["a", "", ""], without("b"), 2.0)
    assert said == ["a node was lost, and shards 1, 2 with it: read again where there is room"]
    watch.look(["a", "c", ""], without("b"), 3.0)
    assert said[1:] == ["shard 1 found room on 10.0.0.3 (c)"]
    watch.look(["a", "c", ""], without("b"), 1.0 + SILENCE)
    watch.look(["a", "c", ""], without("b"), 2.0 + SILENCE)
    assert said[2:] == ["no node has room for shard 2: waiting for one to join"]
    watch.look(["a", "c", "a"], without("b"), 3.0 + SILENCE)
    assert said[3:] == ["shard 2 found room on 10.0.0.1 (a)"]


def test_a_second_loss_is_told_like_the_first(watch, said):
    for lost, nodes in (("b", ["a", "c", "c"]), ("c", ["a", "a", "a"])):
        watch.look(nodes, without(lost), 0.0)
    assert [line.split(",")[0] for line in said] == ["a node was lost", "shards 1"] * 2
