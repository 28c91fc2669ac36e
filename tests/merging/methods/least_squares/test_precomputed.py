from dataclasses import replace

import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS

ALL = dict.fromkeys(("amazon", "movie", "nyt", "tweets"), 1.0)


@pytest.fixture(params=[("regmean_propagated", "propagated"), ("distilled", "distilled")], ids=lambda pair: pair[0])
def pair(request):
    return request.param


@pytest.fixture
def method(pair):
    return pair[0]


@pytest.fixture
def kind(pair):
    return pair[1]


@pytest.fixture
def solved(make_pool, kind):
    """A pool's weights with a solution for all members."""

    def build(**arguments):
        generator = torch.Generator().manual_seed(5)
        return [
            replace(w, statistics={kind: {"+".join(ALL): w.base + torch.randn(w.base.shape, generator=generator)}})
            for w in make_pool(0, **arguments)
        ]

    return build


@pytest.mark.parametrize("factor", [1.0, 0.7, 1.2])
def test_scales_the_solution_s_distance_from_the_base(solved, merge, assert_close, factor, method, kind):
    weights = solved()
    expected = {
        w.name: w.base.double() + factor * (w.statistics[kind]["+".join(ALL)].double() - w.base.double())
        for w in weights
    }
    assert_close(merge(method, weights, ALL, {"factor": factor}), expected)
    whole = merge(method, weights, ALL, {"factor": factor})
    parts = merge(method, weights, ALL, {"factor": factor}, parts=3)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_at_factor_one_it_is_the_solution_to_the_bit(solved, merge, method, kind):
    weights = solved()
    merged = merge(method, weights, dict(reversed(ALL.items())))
    assert all(torch.equal(merged[w.name], w.statistics[kind]["+".join(ALL)]) for w in weights)


def test_other_members_have_no_solution(solved, merge, method, kind):
    with pytest.raises(MethodError, match=rf"no {kind} solution for amazon\+nyt"):
        merge(method, solved(), {"amazon": 1.0, "nyt": 1.0})


def test_members_have_no_factors(method):
    with pytest.raises(MethodError, match="scaling factor of 'nyt' = 0.5 is outside 1"):
        METHODS[method].complete(replace(METHODS[method].default_recipe(list(ALL)), scaling={**ALL, "nyt": 0.5}))
