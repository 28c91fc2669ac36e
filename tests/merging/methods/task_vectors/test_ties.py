import torch

from merging.methods import Weight


def pair(first, second):
    return [Weight("w", torch.zeros(len(first)), {"a": torch.tensor(first), "b": torch.tensor(second)})]


def test_only_entries_that_agree_with_the_elected_sign_are_merged(merge):
    weights = pair([3.0, -1.0, 2.0, 0.0], [-1.0, -3.0, 4.0, 5.0])
    merged = merge("ties", weights, {"a": 1.0, "b": 1.0}, {"density": 1.0})["w"]
    assert merged.tolist() == [3.0, -2.0, 3.0, 5.0]
    added = merge("ties", weights, {"a": 1.0, "b": 1.0}, {"density": 1.0, "disjoint": "sum"})["w"]
    assert added.tolist() == [3.0, -4.0, 6.0, 5.0]


def test_opposite_entries_leave_the_base_whatever_their_common_factor(merge):
    weights = pair([0.1, -0.7, 0.3], [-0.1, 0.7, -0.3])
    assert not merge("ties", weights, {"a": 0.3, "b": 0.3}, {"density": 1.0})["w"].any()


def test_factors_weigh_the_election_and_the_mean(merge):
    weights = pair([3.0, 1.0], [-1.0, 4.0])
    merged = merge("ties", weights, {"a": 1.0, "b": 4.0}, {"density": 1.0})["w"]
    torch.testing.assert_close(merged, torch.tensor([-1.0, 3.4]))


def test_a_negative_factor_turns_a_member_round(merge):
    weights = pair([3.0, 1.0], [-1.0, 4.0])
    merged = merge("ties", weights, {"a": 1.0, "b": -1.0}, {"density": 1.0})["w"]
    assert merged.tolist() == [2.0, -4.0]


def test_global_trim_can_leave_a_whole_weight_to_the_base(merge):
    weights = [
        Weight("loud", torch.zeros(4), {"a": torch.tensor([9.0, 8.0, 7.0, 6.0])}),
        Weight("quiet", torch.zeros(4), {"a": torch.tensor([0.4, 0.3, 0.2, 0.1])}),
    ]
    merged = merge("ties", weights, {"a": 1.0}, {"density": 0.5})
    assert merged["loud"].tolist() == [9.0, 8.0, 7.0, 6.0]
    assert not merged["quiet"].any()
    merged = merge("ties", weights, {"a": 1.0}, {"density": 0.5, "trim": "tensor"})
    assert merged["loud"].tolist() == [9.0, 8.0, 0.0, 0.0]
    assert (merged["quiet"] != 0).tolist() == [True, True, False, False]
