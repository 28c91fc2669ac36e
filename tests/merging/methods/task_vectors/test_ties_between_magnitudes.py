"""A bfloat16 model's task vectors have few distinct magnitudes: what is kept of them may favour no layer and no place."""

from dataclasses import replace

import pytest
import torch

from merging.methods import Weight

SIZE = 20_000


@pytest.fixture(scope="module")
def layers():
    """Twelve alike layers, moved as fine-tuning moves them: a step of bfloat16 here and there."""
    g = torch.Generator().manual_seed(0)
    weights = []
    for number in range(12):
        base = (0.02 * torch.randn(100, SIZE // 100, generator=g)).to(torch.bfloat16)
        members = {
            m: (base.float() + 1e-4 * torch.randn(base.shape, generator=g)).to(torch.bfloat16) for m in ("a", "b")
        }
        weights.append(Weight(f"layer.{number}.weight", base, members))
    return weights


def kept(weights, out):
    """Which of an only member's entries are in the merge, and which could be."""
    pairs = {w.name: (out[w.name].float() != w.base.float(), w.members["a"].float() != w.base.float()) for w in weights}
    return {name: (stays & moved).reshape(-1) for name, (stays, moved) in pairs.items()}


def assert_even(shares, sizes, wanted):
    """Every share within five standard errors of what all have."""
    for share in shares:
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / sizes) ** 0.5


CASES = [
    ("ties", {"density": 0.2}, 0.2),
    ("ties", {"density": 0.05}, 0.05),
    ("ties", {"density": 0.2, "trim": "tensor"}, 0.2),
    ("breadcrumbs", {"density": 0.15, "gamma": 0.0}, 0.15),
    ("breadcrumbs", {"density": 0.1, "gamma": 0.02}, 0.1),
]


@pytest.mark.parametrize(("method", "parameters", "density"), CASES)
@pytest.mark.parametrize("path", ["loops", "torch"])
def test_no_layer_and_no_row_is_favoured(method, parameters, density, path, layers, merge, subset):
    weights = subset(layers, ["a"])
    if path == "torch":  # which the loops do not take
        weights = [replace(w, base=w.base.double(), members={"a": w.members["a"].double()}) for w in weights]
    whole = kept(weights, merge(method, weights, {"a": 1.0}, parameters))
    assert_even([float(stays.float().mean()) for stays in whole.values()], SIZE, density)
    tenths = torch.cat(list(whole.values())).view(12, 10, -1).float().mean((0, 2))
    assert_even(tenths.tolist(), 12 * SIZE / 10, density)


@pytest.mark.parametrize(("method", "parameters", "density"), CASES)
def test_loops_torch_chunks_and_order_keep_the_same_entries(method, parameters, density, layers, merge, subset):
    weights = subset(layers, ["a"])
    whole = kept(weights, merge(method, weights, {"a": 1.0}, parameters))
    wide = [replace(w, base=w.base.double(), members={"a": w.members["a"].double()}) for w in weights]
    turned = list(reversed(weights))
    for others in (wide, turned):
        result = kept(others, merge(method, others, {"a": 1.0}, parameters))
        assert all(torch.equal(result[name], whole[name]) for name in whole)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_copies_of_a_member_are_trimmed_alike(method, layers, merge, subset):
    one = subset(layers[:2], ["a"])
    two = [replace(w, members={"a": w.members["a"], "copy": w.members["a"]}) for w in one]
    alone, both = merge(method, one, {"a": 1.0}), merge(method, two, {"a": 0.5, "copy": 0.5})
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value)


def test_a_magnitude_that_all_share_is_kept_evenly_between_two_thresholds(merge):
    """All entries are alike: breadcrumbs' two thresholds are one magnitude, and its share is still kept."""
    sign = torch.tensor([1.0, -1.0]).repeat(SIZE // 2)
    weights = [Weight("w", torch.zeros(SIZE), {"a": 0.5 * sign})]
    merged = merge("breadcrumbs", weights, {"a": 1.0}, {"density": 0.6, "gamma": 0.3})
    assert_even([float((part != 0).float().mean()) for part in merged["w"].split(SIZE // 10)], SIZE / 10, 0.6)


def test_della_gives_equal_entries_one_probability(merge):
    rows = torch.ones(400, 100)
    weights = [Weight("w", torch.zeros_like(rows), {"a": rows})]
    merged = merge("della", weights, {"a": 1.0}, {"density": 0.5, "epsilon": 0.4})
    assert_even([float((part != 0).float().mean()) for part in merged["w"].chunk(10, dim=1)], 4000, 0.5)
    assert len(merged["w"].unique()) == 2, "and so one scale"


def test_a_row_of_one_entry_is_kept_with_the_mean_probability(merge):
    weights = [Weight("w", torch.zeros(4000, 1), {"a": torch.ones(4000, 1)})]
    merged = merge("della", weights, {"a": 1.0}, {"density": 0.5, "epsilon": 0.4})
    assert_even([float((merged["w"] != 0).float().mean())], 4000, 0.5)
