import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.mergers.shard_planning import place
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors

QKV = {f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key", "value")}


@pytest.fixture(scope="module")
def material(tiny_pool, tmp_path_factory):
    """The tiny pool, and a Gram that query, key and value of the first layer share."""
    pool = Pool.open(str(tiny_pool["base"]), {name: str(path) for name, path in tiny_pool.items() if name != "base"})
    path = str(tmp_path_factory.mktemp("statistics") / "one.gram.safetensors")
    holder, *others = sorted(pool.members["one"].names[name] for name in QKV)
    about = Partial({}, {"examples": 1, "tokens": 1}, shared=dict.fromkeys(others, holder))
    file = save_tensors(path, "gram", {}, {holder: torch.eye(32)}, about, checkpoint="", data="")
    return Material(pool, {"gram": {"one": file}})


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_every_weight_lies_in_one_shard_of_about_equal_bytes(material, shards):
    places = place(material, ["ties"], shards)
    assert len(places) == shards
    assert sorted(name for result in places for name in result.names) == sorted(material.pool.weights)
    stored = sum(info.nbytes for info in material.pool.weights.values())
    # base and three members, and one Gram, though three weights ask for it
    assert sum(result.read_bytes for result in places) == 4 * stored + 4 * 32 * 32
    assert sum(result.merged_bytes for result in places) == stored
    largest = max(info.nbytes for info in material.pool.weights.values())
    assert max(p.held_bytes for p in places) <= sum(p.held_bytes for p in places) / shards + 5 * 3 * largest


def test_weights_that_share_a_statistic_lie_together(material):
    places = place(material, ["regmean"], 1000)
    assert {frozenset(result.names) & QKV for result in places} == {frozenset(), frozenset(QKV)}
    assert len(places) == len(material.pool.weights) - 2
    # what RegMean prepares of three members is counted, and what an average refers to is not
    average = place(material, ["average"], 1)[0]
    assert place(material, ["regmean"], 1)[0].held_bytes - average.held_bytes == 3 * average.merged_bytes
