import pytest
import torch

from merging.errors import MethodError
from merging.methods import Weight


def test_larger_entries_of_a_row_stay_more_often_and_the_expectation_is_kept(merge):
    row = torch.linspace(0.1, 1.0, 200).repeat(400, 1)
    weight = Weight("w", torch.zeros_like(row), {"a": row})
    merged = merge("della", [weight], {"a": 1.0}, {"density": 0.5, "epsilon": 0.4})["w"]
    kept = (merged != 0).float().mean(0)
    assert abs(float(kept[:20].mean()) - 0.14) < 0.03
    assert abs(float(kept[-20:].mean()) - 0.86) < 0.03
    assert abs(float((merged / row).mean()) - 1) < 0.03


def test_probabilities_outside_their_range_are_refused(make_pool, merge):
    with pytest.raises(MethodError, match=r"density 0\.9 ± epsilon 0\.2 leaves 0 … 1"):
        merge("della", make_pool(), {"nyt": 1.0}, {"density": 0.9, "epsilon": 0.2})
