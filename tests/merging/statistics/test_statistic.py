import copy

import pytest
import torch

from merging.errors import StatisticsError
from merging.statistics import Partial


def part(value: float, examples: int, **more: object) -> Partial:
    return Partial({"w": torch.full((2,), value)}, {"examples": examples, "tokens": 2 * examples}, **more)


def test_sums_and_counts_add_up():
    total = part(1.0, 2).combine(part(5.0, 3))
    assert total.sums["w"].tolist() == [6.0, 6.0]
    assert total.counts == {"examples": 5, "tokens": 10}


def test_an_empty_part_is_neutral():
    full = part(1.0, 2)
    assert Partial().combine(full) is full
    assert full.combine(Partial()) is full


def test_parts_of_different_models_are_refused():
    other = Partial({"v": torch.ones(2)}, {"examples": 1})
    for stranger in (other, part(1.0, 1, shared={"k": "w"})):
        with pytest.raises(StatisticsError, match="different models"):
            part(1.0, 2).combine(stranger)


def test_a_layer_that_no_row_of_a_shard_reached_adds_nothing():
    shared = {"sums": {"w": torch.ones(2)}, "shared": {"k": "w"}}
    seen = Partial(counts={"examples": 1}, **shared)
    for first, second in ((part(1.0, 2, unreached=("k",)), seen), (seen, part(1.0, 2, unreached=("k",)))):
        both = copy.deepcopy(first).combine(copy.deepcopy(second))
        assert (both.sums["w"].tolist(), both.sums["k"].tolist(), both.unreached) == ([2.0, 2.0], [1.0, 1.0], ())


def test_a_layer_that_is_not_known_of_a_shard_is_not_known_of_all():
    seen = Partial({"w": torch.ones(2)}, {"examples": 1, "w": 4}, shared={"k": "w"})
    unknown = Partial({"k": torch.ones(2)}, {"examples": 2, "k": 3}, uncovered=("w",))
    for first, second in ((seen, unknown), (unknown, seen)):
        both = copy.deepcopy(first).combine(copy.deepcopy(second))
        assert both.uncovered == ("w",)
        assert {name: value.tolist() for name, value in both.sums.items()} == {"k": [2.0, 2.0]}
        assert both.counts == {"examples": 3, "k": 7}
