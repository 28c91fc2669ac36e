import pytest
import torch

from merging.methods import METHODS, Weight


def pool(rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(12, 10, generator=g)

    def step():
        if rank is None:
            return torch.randn(12, 10, generator=g)
        return torch.randn(12, rank, generator=g) @ torch.randn(rank, 10, generator=g)

    return Weight("w", base, {name: base + 0.1 * step() for name in "abc"})


def interference(weight, step):
    taus = [value.double() - weight.base.double() for value in weight.members.values()]
    return sum(((step - tau) @ tau.T).square().sum() / tau.square().sum() for tau in taus)


@pytest.mark.parametrize("rank", [None, 2])
def test_wudi_has_the_least_interference(rank, merge):
    weight = pool(rank)
    merged = merge("wudi", [weight], dict.fromkeys("abc", 1.0))["w"]
    step = (merged.double() - weight.base.double()).requires_grad_()
    least = interference(weight, step)
    (gradient,) = torch.autograd.grad(least, step)
    assert gradient.norm() < 1e-4 * step.norm() * sum(value.norm() for value in weight.members.values())
    for seed in range(5):
        other = 1e-2 * torch.randn(step.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert interference(weight, step + other) > least


def test_wudi_of_members_with_rows_of_their_own_is_their_sum(merge):
    """Nothing interferes, so that nothing is given up."""
    g = torch.Generator().manual_seed(1)
    base = torch.zeros(6, 6)
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[:, :3], two[:, 3:] = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    merged = merge("wudi", [Weight("w", base, {"a": one, "b": two})], {"a": 1.0, "b": 1.0})["w"]
    torch.testing.assert_close(merged, one + two, rtol=1e-4, atol=1e-5)


def test_ace_does_not_depend_on_the_unit_of_weights(merge):
    weight = pool()
    small = Weight("w", weight.base * 1e-3, {name: value * 1e-3 for name, value in weight.members.items()})
    scaling = {"a": 0.5, "b": 1.0, "c": 0.7}
    torch.testing.assert_close(
        merge("ace", [small], scaling)["w"] * 1e3, merge("ace", [weight], scaling)["w"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", ["ace", "wudi"])
def test_members_that_did_not_move_leave_the_base(method, merge):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    merged = merge(method, [Weight("w", base, {"a": base, "b": base})], {"a": 1.0, "b": 1.0})
    assert torch.equal(merged["w"], base)


@pytest.mark.parametrize(("model_type", "epsilon"), [("gpt2", 4e-2), ("roberta", 2e-4), ("bert", 1e-5), ("", 1e-5)])
def test_ace_s_ridge_follows_the_architecture(model_type, epsilon):
    assert METHODS["ace"].default_recipe(["a"], model_type).parameters["epsilon"] == epsilon
