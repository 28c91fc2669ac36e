import pytest
import torch

from merging.methods import Weight


def test_task_vectors_that_are_equally_strong_everywhere_are_simply_added(merge):
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(12, 5, generator=generator))
    base = torch.randn(12, 5, generator=generator)
    weights = [Weight("w", base, {"a": base + 0.3 * turn, "b": base + 0.1 * turn})]
    torch.testing.assert_close(merge("iso_c", weights, {"a": 1.0, "b": 0.5})["w"], base + 0.35 * turn)


def test_directions_that_are_only_rounding_are_not_made_strong(merge):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 30, generator=generator)
    adapter = torch.randn(40, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    step = merge("iso_c", [Weight("w", base, {"a": base + adapter})], {"a": 1.0})["w"] - base
    sizes = torch.linalg.svdvals(step)
    assert sizes[4] < 1e-4 * sizes[0]
    torch.testing.assert_close(sizes[:4], torch.linalg.svdvals(adapter)[:4].mean().expand(4), rtol=1e-4, atol=0)


def test_members_that_did_not_move_leave_the_base(merge):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(merge("iso_c", [Weight("w", base, {"a": base, "b": base})], {"a": 1.0, "b": 1.0})["w"], base)


@pytest.mark.parametrize("factor", [0.7, -0.4])
def test_a_shared_factor_agrees_with_the_float64_reference(factor, make_pool, merge, complete, reference, assert_close):
    weights = make_pool(5)
    scaling = dict.fromkeys(weights[0].members, factor)
    expected = reference.iso_c(weights, scaling, complete("iso_c", scaling), {})
    assert_close(merge("iso_c", weights, scaling), expected)
