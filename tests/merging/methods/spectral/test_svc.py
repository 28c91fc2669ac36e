import pytest
import torch

from merging.methods import METHODS, Context, Weight


def test_what_members_agree_on_is_as_strong_as_in_each_of_them(merge):
    g = torch.Generator().manual_seed(0)
    base, step = torch.randn(8, 5, generator=g), torch.randn(8, 5, generator=g)
    weight = Weight("w", base, dict.fromkeys("abc", base + step))
    merged = merge("svc+task_arithmetic", [weight], dict.fromkeys("abc", 1.0))["w"]
    torch.testing.assert_close(merged, base + step, rtol=1e-4, atol=1e-5)


def test_what_only_one_member_has_stays(merge):
    base = torch.zeros(6, 6)
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[0, 0], two[1, 1] = 1.0, 2.0
    merged = merge("svc+task_arithmetic", [Weight("w", base, {"a": one, "b": two})], {"a": 1.0, "b": 1.0})["w"]
    torch.testing.assert_close(merged, one + two)


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.3])
def test_a_shared_factor_agrees_with_the_float64_reference(factor, make_pool, merge, complete, reference, assert_close):
    weights = make_pool(5)
    scaling = dict.fromkeys(weights[0].members, factor)
    name = "svc+task_arithmetic"
    expected = getattr(reference, name)(weights, scaling, complete(name, scaling), {})
    assert_close(merge(name, weights, scaling), expected)


def test_directions_are_found_once_for_all_shared_factors(make_pool, monkeypatch):
    weights = make_pool(0)
    prepared = METHODS["svc+task_arithmetic"].prepare(weights, Context())
    out = {w.name: torch.empty(w.base.shape) for w in weights}
    decompositions = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda value: decompositions.append(1) or eigh(value))
    for factor in (0.3, 0.5, 1.0):
        prepared.merge(dict.fromkeys(weights[0].members, factor), {}, out)
        seen = seen if factor > 0.3 else len(decompositions)  # noqa: F821
        assert len(decompositions) == seen > 0


def test_modifiers_compose_with_the_parameters_of_all():
    method = METHODS["svc+lines+ties"]
    assert method.parameters.keys() == {*METHODS["ties"].parameters, "a", "b"}
    recipe = method.default_recipe(["x", "y"])
    assert method.complete(recipe) == recipe
    assert not method.elementwise
    assert METHODS["svc+regmean"].requires == ("gram",)
