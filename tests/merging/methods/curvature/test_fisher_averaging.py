import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS, Context, Weight

EQUAL = {"amazon": 1.0, "movie": 1.0, "nyt": 1.0, "tweets": 1.0}


def scaled(weights, factors):
    for w in weights:
        if "fisher" in w.statistics:
            w.statistics["fisher"].update({m: w.statistics["fisher"][m] * f for m, f in factors.items()})
    return weights


def test_equal_fishers_give_the_mean(make_pool, merge, assert_close):
    weights = make_pool()
    for w in weights:
        if "fisher" in w.statistics:
            w.statistics["fisher"].update(dict.fromkeys(EQUAL, w.statistics["fisher"]["nyt"]))
    assert_close(merge("fisher", weights, EQUAL), merge("average", weights, EQUAL))


def test_an_entry_that_no_member_uses_is_the_mean(make_pool, merge, assert_close):
    weights = make_pool()
    for w in weights:
        if w.name == "layer.0.up.weight":
            for fisher in w.statistics["fisher"].values():
                fisher.zero_()
    name = "layer.0.up.weight"
    merged, mean = merge("fisher", weights, EQUAL), merge("average", weights, EQUAL)
    assert_close({name: merged[name]}, {name: mean[name]})


def test_an_entry_that_one_member_uses_is_that_members(make_pool, merge):
    weights = make_pool()
    for w in weights:
        for member in EQUAL:
            if "fisher" in w.statistics and member != "nyt":
                w.statistics["fisher"][member][...] = torch.where(w.statistics["fisher"][member] > 1e-4, 0.0, 1e-3)
    w = weights[1]
    alone = torch.stack([w.statistics["fisher"][m] for m in EQUAL if m != "nyt"]).sum(0) == 0
    assert alone.any()
    merged = merge("fisher", weights, EQUAL)[w.name]
    torch.testing.assert_close(merged[alone], w.members["nyt"][alone], rtol=0, atol=1e-2)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_normalised_fishers_may_be_tiny_or_huge(factor, make_pool, merge, assert_close):
    plain = merge("fisher", make_pool(), EQUAL, {"normalize": True})
    assert_close(merge("fisher", scaled(make_pool(), {"movie": factor}), EQUAL, {"normalize": True}), plain)
    assert_close(
        merge("fisher", scaled(make_pool(), dict.fromkeys(EQUAL, factor)), EQUAL, {"normalize": False}),
        merge("fisher", make_pool(), EQUAL, {"normalize": False}),
    )


def test_without_normalisation_a_larger_fisher_weighs_more(make_pool, merge, assert_close):
    weights = scaled(make_pool(), {"movie": 1e9})
    merged = merge("fisher", weights, EQUAL, {"normalize": False})
    name = "layer.0.up.weight"
    movie = next(w.members["movie"] for w in weights if w.name == name)
    assert_close({name: merged[name]}, {name: movie}, tolerance=0.02)


def test_a_negative_factor_that_cancels_names_the_share_and_writes_nothing():
    fisher = {"a": torch.tensor([1.0, 1.0, 1.0, 4.0]), "b": torch.tensor([1.0, 2.0, 3.0, 1.0])}
    weight = Weight("w", torch.zeros(4), {"a": torch.ones(4), "b": torch.ones(4)}, {"fisher": fisher})
    prepared = METHODS["fisher"].prepare([weight], Context())
    out = {"w": torch.full((4,), 7.0)}
    with pytest.raises(MethodError, match=r"50\.00% of the entries \(2 of 4\)"):
        prepared.merge({"a": 1.0, "b": -0.5}, {"normalize": False}, out)
    assert out["w"].tolist() == [7.0] * 4
    prepared.merge({"a": 1.0, "b": -0.3}, {"normalize": False}, out)
    torch.testing.assert_close(out["w"], torch.ones(4))


def test_a_member_without_any_fisher_is_named(make_pool):
    weights = scaled(make_pool(), {"movie": 0.0})
    with pytest.raises(MethodError, match="movie: its Fisher information is missing or zero everywhere"):
        METHODS["fisher"].prepare(weights, Context())
    for w in weights:
        w.statistics.pop("fisher", None)
    with pytest.raises(MethodError, match="amazon: its Fisher information is missing"):
        METHODS["fisher"].prepare(weights, Context())
