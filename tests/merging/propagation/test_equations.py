import pytest
import torch

from merging.propagation.equations import Equations

CPU = torch.device("cpu")


def summed(x, e, y):
    equations = Equations(CPU)
    equations.update(x, e, y)
    total = Equations(CPU)
    total.add_mean(equations)
    return total


def test_members_count_equally_whatever_their_rows():
    torch.manual_seed(0)
    x, e = torch.randn(20, 3), torch.randn(20, 2)
    few, many = Equations(CPU), Equations(CPU)
    few.update(x, e, e)
    for _ in range(5):
        many.update(x, -e, e)
    total = Equations(CPU)
    total.add_mean(few)
    total.add_mean(many)
    assert total.rows == 120
    assert total.solve(0.1, False, "w").delta.abs().max() < 1e-6


def test_a_ridge_holds_weights_back_and_not_the_bias():
    ones = torch.ones(50, 1)
    x = torch.cat([torch.randn(50, 2, generator=torch.Generator().manual_seed(1)), ones], dim=1)
    e = 3.0 * ones
    free, held = summed(x, e, e).solve(0.0, True, "w"), summed(x, e, e).solve(1e9, True, "w")
    for result in (free, held):
        torch.testing.assert_close(
            result.delta[:, 0], torch.tensor([0, 0, 3.0], dtype=torch.float64), rtol=0, atol=1e-5
        )
    assert summed(x, e, e).solve(1e9, False, "w").delta.abs().max() < 1e-6


def test_shares_that_are_missed_before_and_after():
    x = torch.tensor([[1.0], [2.0]])
    result = summed(x, torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [0.0]])).solve(0.0, False, "w")
    assert result.delta.item() == pytest.approx(0.6)
    assert result.before == pytest.approx(0.5)
    assert result.after == pytest.approx((0.4**2 + 0.2**2) / 4)


def test_inputs_that_are_never_seen_get_a_ridge_and_stay():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    e = 2 * x[:, :1]
    result = summed(x, e, e).solve(0.0, False, "w")
    torch.testing.assert_close(result.delta[:, 0], torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    twin = torch.cat([x[:, :1], x[:, :1]], dim=1)
    assert summed(twin, e, e).solve(0.0, False, "w").added > 0


def test_numbers_that_are_not_finite_are_told():
    equations = Equations(CPU)
    equations.update(torch.ones(2, 2), torch.ones(2, 1), torch.ones(2, 1))
    assert equations.finite
    equations.update(torch.full((2, 2), float("inf")), torch.ones(2, 1), torch.ones(2, 1))
    assert not equations.finite
