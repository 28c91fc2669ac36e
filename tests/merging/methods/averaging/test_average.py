import pytest
import torch

from merging.errors import MethodError


def test_factors_are_relative(make_pool, merge, assert_close):
    weights = make_pool()
    assert_close(
        merge("average", weights, {"amazon": 2.0, "nyt": 6.0}),
        merge("average", weights, {"amazon": 0.25, "nyt": 0.75}),
        1e-6,
    )


def test_a_negative_factor_removes(make_pool, merge, assert_close):
    weights = make_pool()
    expected = {w.name: 2 * w.members["amazon"].double() - w.members["nyt"].double() for w in weights}
    assert_close(merge("average", weights, {"amazon": 2.0, "nyt": -1.0}), expected)


def test_factors_that_cancel_are_refused(make_pool, merge):
    with pytest.raises(MethodError, match="amazon, nyt sum to 0"):
        merge("average", make_pool(), {"amazon": 1.0, "nyt": -1.0})


def test_members_with_no_factor_are_not_read(make_pool, merge):
    weights = make_pool()
    weights[0].members["nyt"].fill_(float("nan"))
    assert torch.equal(
        merge("average", weights, {"amazon": 1.0, "nyt": 0.0})[weights[0].name], weights[0].members["amazon"]
    )
