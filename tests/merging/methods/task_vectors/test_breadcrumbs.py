import torch

from merging.methods import Weight


def test_the_largest_and_the_smallest_entries_are_dropped(merge):
    moved = torch.tensor([5.0, -0.1, 1.0, -9.0, 3.0, 0.2, -2.0, 4.0, 0.0, 0.3])
    weights = [Weight("w", torch.zeros(10), {"a": moved})]
    merged = merge("breadcrumbs", weights, {"a": 1.0}, {"density": 0.4, "gamma": 0.2})["w"]
    assert merged.tolist() == [0.0, 0.0, 1.0, 0.0, 3.0, 0.0, -2.0, 4.0, 0.0, 0.0]
