from dataclasses import replace
from functools import reduce

import pytest
import torch

from merging.methods import Weight
from merging.methods.task_vectors import magnitude_histogram, top_k


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


def kept(weights, global_stats, density, scope, chunk=1000):
    trimmer = top_k.Trimmer(weights, global_stats)
    result = {}
    for w in weights:
        cut = trimmer.cut("m", density, "" if scope == "global" else w.name)
        row = w.members["m"].float() - w.base.float()
        for start in range(0, row.numel(), chunk):
            piece = row[start : start + chunk]
            cut.apply(piece, trimmer.numbers(w, w.start + start, piece.numel(), [cut]))
        result[w.name] = torch.cat([result.get(w.name, row[:0]), row])
    return result


@pytest.fixture
def expected(reference):
    """The largest entries, of equal ones those that chance picks, by the float64 reference."""
    return lambda weights, density, scope: {
        name: value.float() for name, value in reference.trimmed(weights, "m", density, scope).items()
    }


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [1e-6, 0.05, 0.2, 0.5001, 0.97, 1.0])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, None), (torch.float32, 2000), (torch.bfloat16, None)])
def test_exactly_the_largest_stay_whatever_the_bins(scope, density, dtype, steps, expected):
    weights = model(0, (40_000, 7, 3000, 20_000), dtype, steps)
    result = kept(weights, top_k.global_pass(weights), density, scope)
    wanted = expected(weights, density, scope)
    assert all(torch.equal(result[name], wanted[name]) for name in wanted)


def test_equal_magnitudes_of_either_sign_are_settled_by_chance():
    signs = torch.tensor([1.0, -1.0]).repeat(5000)
    weights = [Weight(name, torch.zeros(10_000), {"m": 0.5 * signs}) for name in ("b", "a")]
    result = kept(weights, top_k.global_pass(weights), 0.7, "global")
    for name in ("a", "b"):
        for part in result[name].split(2500):
            assert abs(float((part != 0).float().mean()) - 0.7) < 5 * (0.21 / 2500) ** 0.5
        assert torch.equal(result[name][result[name] != 0], (0.5 * signs)[result[name] != 0])
    assert not torch.equal(result["a"], result["b"])


def chunks(weights, size):
    """Every weight in chunks of at most this many entries."""
    return [
        replace(w, base=w.base[i : i + size], members={m: v[i : i + size] for m, v in w.members.items()}, start=i)
        for w in weights
        for i in range(0, w.base.numel(), size)
    ]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("size", [100_000, 17_000, 4_000])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, None), (torch.float32, 300), (torch.bfloat16, None)])
def test_parts_that_are_never_together_keep_what_the_whole_keeps(scope, size, dtype, steps, expected):
    weights = model(3, (40_000, 7, 3000, 20_000), dtype, steps)
    parts = chunks(weights, size)
    global_stats = reduce(top_k.combine, [top_k.global_pass([part]) for part in reversed(parts)])
    answers = [top_k.second_pass([part], global_stats, [0.2, 0.01], whole=scope == "global") for part in parts]
    requested = scope == "global" or size < 40_000
    assert all((answer is not None) == requested for answer in answers)
    global_stats = reduce(top_k.combine, [answer for answer in answers if answer], global_stats)
    for density in (0.2, 0.01):
        wanted = expected(weights, density, scope)
        pieces = {name: [] for name in wanted}
        for part in parts:
            pieces[part.name].append(kept([part], global_stats, density, scope)[part.name])
        assert all(torch.equal(torch.cat(result), wanted[name]) for name, result in pieces.items())


def test_parts_keep_as_many_as_the_whole(expected):
    weights = model(1, (40_000, 7, 3000, 20_000))
    global_stats = top_k.global_pass(weights)
    parts = [kept(weights[:2], global_stats, 0.2, "global"), kept(weights[2:], global_stats, 0.2, "global")]
    result = parts[0] | parts[1]
    assert (
        abs(sum(int((value != 0).sum()) for value in result.values()) - round(0.2 * 63_007))
        < 5 * (0.002 * 63_007) ** 0.5
    )
    wanted = expected(weights, 0.2, "global")
    differing = sum(int((result[name] != wanted[name]).sum()) for name in wanted)
    assert differing <= 0.004 * 63_007, "only entries within one bin of the threshold may be settled by chance"


def test_parts_of_few_distinct_magnitudes_keep_what_the_whole_keeps(expected):
    weights = model(2, (5000, 7, 3000, 9000), torch.bfloat16)
    global_stats = top_k.global_pass(weights)
    result = kept(weights[::2], global_stats, 0.3, "global") | kept(weights[1::2], global_stats, 0.3, "global")
    wanted = expected(weights, 0.3, "global")
    assert all(torch.equal(result[name], wanted[name]) for name in wanted)


def test_entries_that_did_not_move_fill_up_a_density_above_the_share_that_did():
    moved = torch.zeros(100)
    moved[10:30] = 1.0
    weights = [Weight("w", torch.zeros(100), {"m": moved})]
    assert torch.equal(kept(weights, top_k.global_pass(weights), 0.5, "global")["w"], moved)


@pytest.mark.parametrize("spread", [4.0, 0.0])
@pytest.mark.parametrize("size", [100_000, 17_000])
@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, None), (torch.float32, 300), (torch.float32, 20), (torch.bfloat16, None)]
)
def test_a_sample_refined_keeps_what_the_whole_keeps(spread, size, dtype, steps, monkeypatch, expected):
    """Also where its band is so narrow that it mostly misses: then everything is counted."""
    monkeypatch.setattr(top_k, "SPREAD", spread)
    monkeypatch.setattr(magnitude_histogram, "PERIOD", 512)
    weights = model(4, (40_000, 7, 3000, 20_000), dtype, steps)
    parts = chunks(weights, size)
    for density in (1e-6, 0.2, 0.97, 1.0):
        known = reduce(top_k.combine, [top_k.sample([part]) for part in parts])
        looks = 0
        while answers := [
            answer for part in parts if (answer := top_k.second_pass([part], known, [density], whole=True))
        ]:
            assert len(answers) == len(parts)
            known, looks = reduce(top_k.combine, answers, known), looks + 1
        assert looks <= (1 if spread > 0 else 3)
        pieces = {weight.name: [] for weight in weights}
        for part in parts:
            pieces[part.name].append(kept([part], known, density, "global")[part.name])
        wanted = expected(weights, density, "global")
        assert all(torch.equal(torch.cat(result), wanted[name]) for name, result in pieces.items())


def test_a_sample_of_what_is_alike_side_by_side_knows_how_little_it_says(monkeypatch):
    """Rows of one scale each, half of which did not move: a band for entries drawn one by one would miss mostly."""
    monkeypatch.setattr(magnitude_histogram, "PERIOD", 1024)
    g = torch.Generator().manual_seed(4)
    scale = torch.exp(2 * torch.randn(6000, 1, generator=g)) * (torch.rand(6000, 1, generator=g) < 0.5)
    weights = [
        Weight("rows", torch.zeros(6000 * 160), {"m": (scale * torch.randn(6000, 160, generator=g)).reshape(-1)})
    ]
    known = top_k.sample(weights)
    densities = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    known = top_k.combine(known, top_k.second_pass(weights, known, densities, whole=True))
    assert not known.histograms
    assert top_k.second_pass(weights, known, densities, whole=True) is None, "no band missed"


def test_what_a_sample_leaves_to_be_counted_grows_with_the_root_of_the_model(monkeypatch):
    """Sixteen times the entries, four times in the band, and as many bins as there are distinct magnitudes."""
    monkeypatch.setattr(magnitude_histogram, "PERIOD", 1024)

    def held(count):
        weights = model(5, (16_000,) * count, torch.bfloat16)
        known = reduce(top_k.combine, [top_k.sample([weight]) for weight in weights])
        answers = [top_k.second_pass([weight], known, [0.2], whole=True) for weight in weights]
        result = [tally for answer in answers for tallies in answer.tallies.values() for tally in tallies.values()]
        return len(known.sampled["m"].keys), sum(int(tally.reaching[0]) for tally in result)

    (few_bins, few), (many_bins, many) = held(20), held(320)
    assert 3 * few < many < 6 * few
    assert many_bins < 4 * few_bins
