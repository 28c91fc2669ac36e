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
