import torch

from merging.methods import Weight


def test_entries_that_matter_to_too_few_members_stay_at_the_base(merge):
    rows = torch.tensor([[1.0, 9.0, 1.0], [1.0, 0.1, 1.0], [1.0, 0.1, -1.0]])
    weights = [Weight("w", torch.zeros(3), dict(zip("abc", rows, strict=True)))]
    factors = dict.fromkeys("abc", 1.0)
    # 9 stands out against 0.2; 0.1 does not against 9.1: one vote. Of 1, 1, −1 each stands out against at most 2.
    assert merge("consensus", weights, factors, {"k": 2, "lambda": 0.4})["w"].tolist() == [3.0, 0.0, 1.0]
    assert merge("consensus", weights, factors, {"k": 4, "lambda": 0.4})["w"].tolist() == [3.0, 0.0, 1.0]
    merged = merge("consensus", weights, factors, {"k": 1, "lambda": 0.4})["w"]
    torch.testing.assert_close(merged, torch.tensor([3.0, 9.2, 1.0]))
