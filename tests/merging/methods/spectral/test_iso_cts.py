import pytest
import torch

from merging.methods import Weight


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_experts_in_one_weight_are_merged_each_for_itself(method, merge):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(3, 12, 9, generator=g)
    members = {name: base + 0.1 * torch.randn(3, 12, 9, generator=g) for name in "ab"}
    scaling = {"a": 0.7, "b": 0.4}
    joined = merge(method, [Weight("mlp.experts.up", base, members)], scaling)["mlp.experts.up"]
    for expert in range(3):
        alone = Weight("w", base[expert], {name: value[expert] for name, value in members.items()})
        torch.testing.assert_close(joined[expert], merge(method, [alone], scaling)["w"])


def test_a_convolution_s_kernel_is_the_mean(merge):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, 3, generator=g)
    members = {name: base + 0.1 * torch.randn(4, 6, 3, generator=g) for name in "ab"}
    merged = merge("iso_cts", [Weight("encoder.conv1.weight", base, members)], {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(merged["encoder.conv1.weight"], (members["a"] + members["b"]) / 2)


def test_one_member_alone_has_the_directions_of_its_task_vector(merge):
    g = torch.Generator().manual_seed(1)
    base, step = torch.randn(10, 7, generator=g), torch.randn(10, 7, generator=g)
    moved = merge("iso_cts", [Weight("w", base, {"a": base + step})], {"a": 1.0})["w"] - base
    u, s, vh = torch.linalg.svd(step, full_matrices=False)
    torch.testing.assert_close(moved, s.mean() * u @ vh, rtol=1e-4, atol=1e-4)


def test_directions_that_are_only_rounding_are_not_made_strong(merge):
    g = torch.Generator().manual_seed(2)
    base = torch.randn(40, 30, generator=g)
    adapters = [torch.randn(40, 2, generator=g) @ torch.randn(2, 30, generator=g) for _ in "ab"]
    weights = [Weight("w", base, {name: base + adapter for name, adapter in zip("ab", adapters, strict=True)})]
    sizes = torch.linalg.svdvals(merge("iso_cts", weights, {"a": 1.0, "b": 1.0})["w"] - base)
    assert sizes[4] < 1e-4 * sizes[0]
    torch.testing.assert_close(sizes[:4], sizes[:4].mean().expand(4), rtol=1e-4, atol=0)
