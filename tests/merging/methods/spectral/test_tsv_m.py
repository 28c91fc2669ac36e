import pytest
import torch

from merging.methods import Weight


def test_one_member_alone_is_that_member(make_pool, merge, assert_close):
    weights = make_pool(7)
    assert_close(merge("tsv_m", weights, {"nyt": 1.0}), {w.name: w.members["nyt"] for w in weights})


def test_members_of_separate_directions_do_not_touch_each_other(merge):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(9, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    one, other = (left[:, part] @ right[:, part].T for part in (slice(0, 2), slice(2, 4)))
    base = torch.randn(9, 4, generator=generator)
    weights = [Weight("w", base, {"a": base + one, "b": base + other})]
    torch.testing.assert_close(merge("tsv_m", weights, {"a": 1.0, "b": 0.5})["w"], base + one + 0.5 * other)


def test_what_members_have_in_common_is_counted_once(merge):
    generator = torch.Generator().manual_seed(1)
    base, step = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)
    merged = merge("tsv_m", [Weight("w", base, {"a": base + step, "b": base + step})], {"a": 1.0, "b": 1.0})["w"]
    u, s, vh = torch.linalg.svd(step, full_matrices=False)
    torch.testing.assert_close(merged - base, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], rtol=1e-4, atol=1e-5)


def test_a_member_that_did_not_move_takes_no_direction(merge):
    generator = torch.Generator().manual_seed(2)
    base, step = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)
    pool = {"a": base + step, "b": base}
    merged = merge("tsv_m", [Weight("w", base, pool)], {"a": 1.0, "b": 1.0})["w"]
    u, s, vh = torch.linalg.svd(step, full_matrices=False)
    torch.testing.assert_close(merged - base, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0.7, -0.4])
def test_a_shared_factor_agrees_with_the_float64_reference(factor, make_pool, merge, complete, reference, assert_close):
    weights = make_pool(5)
    scaling = dict.fromkeys(weights[0].members, factor)
    expected = reference.tsv_m(weights, scaling, complete("tsv_m", scaling), {})
    assert_close(merge("tsv_m", weights, scaling), expected)
