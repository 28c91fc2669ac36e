import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS, Weight
from merging.recipe import Recipe


def right_angle():
    return [Weight("w", torch.zeros(2), {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 2.0])})]


def test_it_stays_on_the_circle_where_a_line_would_cut_it(merge):
    merged = merge("slerp", right_angle(), {"a": 2.0, "b": 1.0})["w"]
    torch.testing.assert_close(merged, 2 * torch.tensor([3**0.5 / 2, 0.5]))


def test_task_vectors_turn_around_the_base(merge):
    weights = [Weight("w", torch.ones(2), {m: v + 1 for m, v in right_angle()[0].members.items()})]
    merged = merge("slerp", weights, {"a": 1.0, "b": 1.0}, {"space": "task_vectors"})["w"]
    torch.testing.assert_close(merged, 1 + torch.full((2,), 2**0.5))


def test_three_members_are_refused(make_pool, merge):
    with pytest.raises(MethodError, match="between two members, not 3: use multi_slerp"):
        merge("slerp", make_pool(), {"amazon": 1.0, "nyt": 1.0, "movie": 1.0})


def test_a_factor_of_one_member_alone_is_refused():
    assert METHODS["slerp"].complete(Recipe("slerp", {"a": 1.0})).members == ("a",)
    for scaling in ({"a": 0.3}, {"a@layers:0-2": 0.3, "a@*": 1.0}):
        with pytest.raises(MethodError, match="'a' is alone"):
            METHODS["slerp"].complete(Recipe("slerp", scaling))
    assert METHODS["slerp"].complete(Recipe("slerp", {"a": 0.3, "b": 0.7})).members == ("a", "b")
