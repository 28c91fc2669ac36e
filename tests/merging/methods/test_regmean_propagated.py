from dataclasses import replace

import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS

ALL = dict.fromkeys(("amazon", "movie", "nyt", "tweets"), 1.0)


@pytest.fixture
def solved(make_pool):
    """A pool's weights with a solution for all members."""

    def build(**arguments):
        generator = torch.Generator().manual_seed(5)
        return [
            replace(
                w, statistics={"propagated": {"+".join(ALL): w.base + torch.randn(w.base.shape, generator=generator)}}
            )
            for w in make_pool(0, **arguments)
        ]

    return build


@pytest.mark.parametrize("factor", [1.0, 0.7, 1.2])
def test_scales_the_solution_s_distance_from_the_base(solved, merge, assert_close, factor):
    weights = solved()
    expected = {
        w.name: w.base.double() + factor * (w.statistics["propagated"]["+".join(ALL)].double() - w.base.double())
        for w in weights
    }
    assert_close(merge("regmean_propagated", weights, ALL, {"factor": factor}), expected)
    whole = merge("regmean_propagated", weights, ALL, {"factor": factor})
    parts = merge("regmean_propagated", weights, ALL, {"factor": factor}, parts=3)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_at_factor_one_it_is_the_solution_to_the_bit(solved, merge):
    weights = solved()
    merged = merge("regmean_propagated", weights, dict(reversed(ALL.items())))
    assert all(torch.equal(merged[w.name], w.statistics["propagated"]["+".join(ALL)]) for w in weights)


def test_other_members_have_no_solution(solved, merge):
    with pytest.raises(MethodError, match=r"no propagated solution for amazon\+nyt"):
        merge("regmean_propagated", solved(), {"amazon": 1.0, "nyt": 1.0})


def test_members_have_no_factors(solved):
    with pytest.raises(MethodError, match="scaling factor of 'nyt' = 0.5 is outside 1"):
        METHODS["regmean_propagated"].complete(
            replace(METHODS["regmean_propagated"].default_recipe(list(ALL)), scaling={**ALL, "nyt": 0.5})
        )
