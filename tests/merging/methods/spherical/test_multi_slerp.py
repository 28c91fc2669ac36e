import pytest
import torch

from merging.errors import MethodError
from merging.methods import Weight


def test_of_two_task_vectors_of_one_length_it_is_slerp(merge, assert_close):
    g = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(50, generator=g, dtype=torch.float64).float() for _ in range(3))
    members = {"a": base + first / first.norm(), "b": base + second / second.norm()}
    weights = [Weight("w", base, members)]
    factors = {"a": 0.3, "b": 0.7}
    assert_close(merge("multi_slerp", weights, factors), merge("slerp", weights, factors, {"space": "task_vectors"}))


def test_of_three_right_angles_it_is_their_middle(merge):
    weights = [Weight("w", torch.zeros(3), {m: 3 * row for m, row in zip("abc", torch.eye(3), strict=True)})]
    merged = merge("multi_slerp", weights, dict.fromkeys("abc", 1.0))["w"]
    torch.testing.assert_close(merged, torch.full((3,), 3**0.5))


def test_opposite_task_vectors_give_the_linear_mean(merge):
    weights = [Weight("w", torch.ones(2), {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([-1.0, 1.0])})]
    torch.testing.assert_close(merge("multi_slerp", weights, {"a": 3.0, "b": 1.0})["w"], torch.tensor([2.0, 1.0]))


def test_negative_factors_are_refused(make_pool, merge):
    with pytest.raises(MethodError, match="no mean with negative scaling factors"):
        merge("multi_slerp", make_pool(), {"amazon": 2.0, "nyt": -1.0})
