import pytest
import torch

from merging.methods import Weight, trim


def model(seed, sizes, dtype=torch.float32, steps=None):
    """Weights w0, w1, … with one member; magnitudes repeat where they are multiples of 1/`steps`."""
    g = torch.Generator().manual_seed(seed)
    weights = []
    for index, size in enumerate(sizes):
        base = torch.zeros(size, dtype=dtype)
        moved = torch.randn(size, generator=g) * 0.01
        if steps:
            moved = (moved * steps).round() / steps
        weights.append(Weight(f"w{index}", base, {"m": moved.to(dtype)}))
    return weights


def kept(weights, survey, density, scope, chunk=1000):
    trimmer = trim.Trimmer(weights, survey)
    found = {}
    for w in weights:
        cut = trimmer.whole("m", density) if scope == "global" else trimmer.tensor(w.name, "m", density)
        row = w.members["m"].float() - w.base.float()
        for start in range(0, row.numel(), chunk):
            cut.apply(row[start : start + chunk], w.name, start)
        found[w.name] = row
    return found


def expected(weights, density, scope):
    """The largest entries by a stable sort: of equal ones, the earlier by name and index."""
    weights = sorted(weights, key=lambda w: w.name)
    result = {}
    for group in [weights] if scope == "global" else [[w] for w in weights]:
        flat = torch.cat([w.members["m"].float() - w.base.float() for w in group])
        keep = flat.abs().sort(descending=True, stable=True).indices[: max(1, round(density * len(flat)))]
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[keep] = True
        parts = torch.where(mask, flat, 0.0).split([w.base.numel() for w in group])
        result |= {w.name: part for w, part in zip(group, parts, strict=True)}
    return result


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [1e-6, 0.05, 0.2, 0.5001, 0.97, 1.0])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, None), (torch.float32, 2000), (torch.bfloat16, None)])
def test_exactly_the_largest_stay_whatever_the_bins(scope, density, dtype, steps):
    weights = model(0, (40_000, 7, 3000, 20_000), dtype, steps)
    found = kept(weights, trim.survey(weights), density, scope)
    wanted = expected(weights, density, scope)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_equal_magnitudes_of_either_sign_are_settled_by_name_and_index():
    signs = torch.tensor([1.0, -1.0]).repeat(10)
    weights = [Weight(name, torch.zeros(20), {"m": 0.5 * signs}) for name in ("b", "a")]
    found = kept(weights, trim.survey(weights), 0.7, "global")
    assert torch.equal(found["a"], 0.5 * signs)
    assert torch.equal(found["b"][:8], 0.5 * signs[:8])
    assert not found["b"][8:].any()


def test_parts_keep_exactly_as_many_as_the_whole():
    weights = model(1, (40_000, 7, 3000, 20_000))
    survey = trim.survey(weights)
    parts = [kept(weights[:2], survey, 0.2, "global"), kept(weights[2:], survey, 0.2, "global")]
    found = parts[0] | parts[1]
    assert sum(int((value != 0).sum()) for value in found.values()) == round(0.2 * 63_007)
    wanted = expected(weights, 0.2, "global")
    differing = sum(int((found[name] != wanted[name]).sum()) for name in wanted)
    assert differing <= 0.004 * 63_007, "only entries within one bin of the threshold may be settled by place"


def test_parts_of_few_distinct_magnitudes_keep_what_the_whole_keeps():
    weights = model(2, (5000, 7, 3000, 9000), torch.bfloat16)
    survey = trim.survey(weights)
    found = kept(weights[::2], survey, 0.3, "global") | kept(weights[1::2], survey, 0.3, "global")
    wanted = expected(weights, 0.3, "global")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_entries_that_did_not_move_fill_up_a_density_above_the_share_that_did():
    moved = torch.zeros(100)
    moved[10:30] = 1.0
    weights = [Weight("w", torch.zeros(100), {"m": moved})]
    assert torch.equal(kept(weights, trim.survey(weights), 0.5, "global")["w"], moved)
