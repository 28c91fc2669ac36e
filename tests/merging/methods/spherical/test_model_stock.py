import torch

from merging.methods import Weight


def stock(merge, second):
    weights = [Weight("w", torch.ones(2), {"a": torch.tensor([3.0, 1.0]), "b": 1 + torch.tensor(second)})]
    return merge("model_stock", weights, {"a": 1.0, "b": 1.0})["w"]


def test_parallel_task_vectors_give_the_mean_and_orthogonal_ones_the_base(merge):
    torch.testing.assert_close(stock(merge, [4.0, 0.0]), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(stock(merge, [0.0, 4.0]), torch.ones(2))
    torch.testing.assert_close(stock(merge, [-4.0, 0.0]), torch.ones(2))


def test_in_between_the_mean_is_drawn_to_the_base(merge):
    # cosine 0.5 of two: t = 2 · 0.5 / 1.5
    merged = stock(merge, [1.0, 3**0.5])
    torch.testing.assert_close(merged, 1 + 2 / 3 * torch.tensor([1.5, 3**0.5 / 2]))
