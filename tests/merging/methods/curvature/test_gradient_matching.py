from dataclasses import replace

import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe

SCALING = {"amazon": 0.7, "movie": 0.4, "nyt": 1.1, "tweets": 0.25}


def without(weights, kind):
    return [replace(w, statistics={k: v for k, v in w.statistics.items() if k != kind}) for w in weights]


@pytest.mark.parametrize("delta", [1e-12, 1.0])
def test_no_curvature_is_task_arithmetic(delta, make_pool, merge, assert_close):
    weights = make_pool()
    plain = merge("task_arithmetic", weights, SCALING)
    assert_close(merge("gradient_matching", without(weights, "fisher"), SCALING, {"delta": delta}), plain)
    for w in weights:
        for fisher in w.statistics.get("fisher", {}).values():
            fisher.zero_()
    assert_close(merge("gradient_matching", weights, SCALING, {"delta": delta}), plain)


def test_no_base_curvature_and_factors_that_sum_to_one_is_fisher_averaging(make_pool, merge, assert_close):
    weights = [w for w in make_pool() if "fisher" in w.statistics]
    for w in weights:
        for fisher in w.statistics["fisher"].values():
            fisher.clamp_(min=1e-5)
    thirds = {"amazon": 0.5, "movie": 0.3, "nyt": 0.2}
    fisher = merge("fisher", weights, thirds, {"normalize": False})
    assert_close(merge("gradient_matching", weights, thirds, {"delta": 0.0}, examples={}), fisher)


@pytest.mark.parametrize("clamp", [False, True])
def test_without_any_curvature_entries_are_the_mean_and_are_counted(clamp, make_pool, merge, assert_close):
    weights = make_pool()
    fishers = [w.statistics["fisher"] for w in weights if "fisher" in w.statistics]
    blind = 0
    for fisher in fishers:
        gaps = torch.rand(fisher["nyt"].shape, generator=torch.Generator().manual_seed(fisher["nyt"].numel())) < 0.3
        blind += int(gaps.sum())
        for value in fisher.values():
            value[gaps] = 0.0
    blind += sum(w.base.numel() for w in weights if "fisher" not in w.statistics)
    method = METHODS["gradient_matching"]
    prepared = method.prepare(weights, Context())
    out = {w.name: torch.empty(w.base.shape) for w in weights}
    parameters = method.complete(Recipe(method.name, SCALING, {"delta": 0.0, "clamp": clamp})).parameters
    prepared.merge(SCALING, parameters, out)
    assert prepared.report() == {"mean_entries": blind}
    expected = {}
    for w in weights:
        fisher = {m: v.double() for m, v in w.statistics.get("fisher", {}).items() if m in SCALING}
        upper = sum(a * fisher[m] * w.members[m].double() for m, a in SCALING.items()) if fisher else 0.0
        lower = sum(a * fisher[m] for m, a in SCALING.items()) if fisher else torch.zeros(w.base.shape)
        mean = sum(a * w.members[m].double() for m, a in SCALING.items()) / sum(SCALING.values())
        expected[w.name] = torch.where(lower > 0, upper / lower, mean)
    assert_close(out, expected)
    prepared.merge(SCALING, parameters | {"delta": 1.0}, out)
    assert prepared.report() == {}


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7])
def test_no_base_curvature_is_fisher_averaging_whatever_the_factors_sum_to(factor, make_pool, merge, assert_close):
    weights = [w for w in make_pool() if "fisher" in w.statistics]
    scaling = dict.fromkeys(SCALING, factor)
    for w in weights:
        for fisher in w.statistics["fisher"].values():
            fisher.clamp_(min=1e-5)
    fisher = merge("fisher", weights, scaling)
    assert_close(merge("gradient_matching", weights, scaling, {"delta": 0.0}, examples={}), fisher)


def test_an_overwhelming_base_is_task_arithmetic(make_pool, merge, assert_close):
    weights = make_pool()
    assert_close(
        merge("gradient_matching", weights, SCALING, {"delta": 1e12}),
        merge("task_arithmetic", weights, SCALING),
    )


def test_numbers_of_examples_weigh_the_curvatures(make_pool, merge, assert_close):
    weights = make_pool()
    counts = {"amazon": 30, "movie": 5, "nyt": 10, "tweets": 1}
    weighted = merge("gradient_matching", weights, SCALING, examples=counts)
    for w in weights:
        for member, fisher in w.statistics.get("fisher", {}).items():
            fisher.mul_(counts.get(member, 1))
    assert_close(weighted, merge("gradient_matching", weights, SCALING, examples={}))


def test_examples_of_only_some_members_are_refused(make_pool):
    with pytest.raises(MethodError, match="unknown for movie, tweets"):
        METHODS["gradient_matching"].prepare(make_pool(), Context(examples={"amazon": 3, "nyt": 4}))


def removal():
    fisher = {"a": torch.tensor([1.0, 1.0, 1.0, 9.0]), "b": torch.tensor([1.0, 2.0, 3.0, 1.0])}
    return [Weight("w", torch.zeros(4), {"a": torch.ones(4), "b": torch.full((4,), 2.0)}, {"fisher": fisher})]


def test_removal_that_cancels_names_the_share_of_entries(merge):
    with pytest.raises(MethodError, match=r"75\.00% of the entries \(3 of 4\).*clamp"):
        merge("gradient_matching", removal(), {"a": 1.0, "b": -1.0}, {"delta": 0.0}, examples={})


def test_removal_may_clamp_instead(merge):
    merged = merge("gradient_matching", removal(), {"a": 1.0, "b": -1.0}, {"delta": 0.5, "clamp": True}, examples={})
    # (0.5 + H_a)·1 − (0.5 + H_b)·2 over max(0.5 + H_a − H_b, 0.5)
    torch.testing.assert_close(merged["w"], torch.tensor([-3.0, -7.0, -11.0, 6.5 / 8.5]))


def test_removal_that_does_not_cancel_is_the_formula(merge):
    merged = merge("gradient_matching", removal(), {"a": 1.0, "b": -0.25}, {"delta": 0.5}, examples={})
    upper = torch.tensor([1.5 - 0.75, 1.5 - 1.25, 1.5 - 1.75, 9.5 - 0.75])
    torch.testing.assert_close(merged["w"], upper / torch.tensor([1.25, 1.0, 0.75, 9.25]))


def test_delta_depends_on_the_base_curvature_unless_given():
    method = METHODS["gradient_matching"]
    assert method.complete(Recipe("gradient_matching", {"a": 1.0})).parameters["delta"] == 1.0
    requested = Recipe("gradient_matching", {"a": 1.0}, {"base_curvature": "fisher"})
    assert method.complete(requested).parameters["delta"] == 1e-12
    given = Recipe("gradient_matching", {"a": 1.0}, {"base_curvature": "fisher", "delta": 0.1})
    assert method.complete(given).parameters["delta"] == 0.1


def test_a_missing_base_fisher_is_named(make_pool, merge):
    weights = make_pool()
    del weights[1].statistics["fisher"]["base"]
    with pytest.raises(MethodError, match=r"base's Fisher, which has nothing for 'layer\.0\.query\.weight'"):
        merge("gradient_matching", weights, SCALING, {"base_curvature": "fisher"})
