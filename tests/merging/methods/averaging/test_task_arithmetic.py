import torch


def test_no_task_at_all_is_the_base_to_the_bit(make_pool, merge):
    weights = make_pool()
    merged = merge("task_arithmetic", weights, {"amazon": 0.0, "nyt": 0.0})
    assert all(torch.equal(merged[w.name], w.base) for w in weights)


def test_one_member_at_factor_one_is_that_member_to_the_bit(make_pool, merge):
    weights = make_pool()
    merged = merge("task_arithmetic", weights, {"nyt": 1.0})
    assert all(torch.equal(merged[w.name], w.members["nyt"]) for w in weights)


def test_adding_and_removing_a_task_cancel(make_pool, merge, assert_close):
    weights = make_pool()
    for w in weights:
        w.members["movie"] = w.members["nyt"].clone()
    assert_close(
        merge("task_arithmetic", weights, {"nyt": 0.8, "movie": -0.8}),
        {w.name: w.base for w in weights},
        1e-6,
    )
