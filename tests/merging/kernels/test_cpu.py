from dataclasses import replace

import pytest
import torch

from merging.kernels import cpu
from merging.kernels.blockwise import Scratch, is_finite, weighted_sum
from merging.methods import Weight
from merging.methods.spherical.inner_products import inner_products
from merging.methods.task_vectors import magnitude_histogram, random_masks

FULL, HALF, SHORT = torch.float32, torch.bfloat16, torch.float16
SIZES = (1, 511, 513, 3001)
CASES = [
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.05, "disjoint": "sum", "trim": "tensor", "lambda": 0.7}),
    ("ties", {"density": 1.0}),
    ("dare", {"drop": 0.7}),
    ("dare", {"drop": 0.4, "entries": "elected", "seed": 3}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.0, "entries": "elected"}),
    ("consensus", {"lambda": 0.45}),
    ("consensus", {"lambda": 0.3, "k": 4}),
]


def pool(kinds, members=5, sizes=SIZES, steps=None):
    """Weights whose members' dtypes take turns; few distinct magnitudes, of which many are equal, with `steps`."""
    g = torch.Generator().manual_seed(0)
    weights = []
    for number, size in enumerate(sizes):
        base = torch.randn(size, generator=g)
        if steps:
            base = (base * steps).round() / steps
        moved = {}
        for m in range(members):
            delta = torch.randn(size, generator=g) * 0.1
            delta = (delta * steps).round() / steps if steps else delta
            moved[f"m{m}"] = (base + delta).to(kinds[m % len(kinds)])
        weights.append(Weight(f"w{number}", base.to(kinds[-1]), moved))
    return weights


def widened(weights):
    """The same numbers in float64, which torch merges."""
    return [
        replace(w, base=w.base.double(), members={m: value.double() for m, value in w.members.items()}) for w in weights
    ]


def same_bits(a, b):
    """Equal entry by entry, where NaN equals NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("to", [FULL, HALF, SHORT])
@pytest.mark.parametrize("kinds", [(FULL,), (HALF,), (SHORT,), (HALF, HALF, HALF, HALF, FULL), (FULL, HALF, SHORT)])
def test_a_sum_is_that_of_float64_and_of_torch(kinds, to):
    for count in (1, 3, 4, 9):
        for w in pool(kinds, count):
            terms = [(value, 0.3 * k - 0.5) for k, value in enumerate((w.base, *w.members.values()))]
            assert cpu.fits(w.base, *w.members.values())
            ours, theirs = torch.empty(w.base.shape, dtype=to), torch.empty(w.base.shape, dtype=to)
            weighted_sum(terms, ours, Scratch())
            weighted_sum([(value.double(), factor) for value, factor in terms], theirs, Scratch())
            exact = sum(value.double() * factor for value, factor in terms)
            size = sum(value.double().abs() * abs(factor) for value, factor in terms)
            rounding = {FULL: 2**-21, HALF: 2**-8, SHORT: 2**-11 + 2**-20}[to]
            assert ((ours.double() - exact).abs() <= rounding * size).all()
            assert ((ours.double() - theirs.double()).abs() <= rounding * size).all()


def test_rounding_is_torch_s_for_every_kind_of_number():
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    halfway = (bits[:50_000] & ~0xFFFF) | 0x8000
    edges = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 0.0, -0.0, 1e-45])
    values = torch.cat([bits.view(FULL), halfway.view(FULL), edges])
    for dtype in (HALF, SHORT):
        out = torch.empty(values.shape, dtype=dtype)
        weighted_sum([(values, 1.0)], out, Scratch())
        assert same_bits(out, values.to(dtype))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(SHORT)
    out = torch.empty(every.shape)
    weighted_sum([(every, 1.0)], out, Scratch())
    assert same_bits(out, every.float())


@pytest.mark.parametrize("steps", [None, 64])
@pytest.mark.parametrize("kinds", [(FULL,), (HALF,), (SHORT,), (HALF, FULL)])
@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_task_vectors_merge_as_torch_has_it(method, parameters, kinds, steps, merge):
    """Whatever the factors' signs; equal magnitudes at the cut are settled the same way.

    Where sums of few bits can cancel, factors are equal: others leave the sign of a rounding error to be elected.
    """
    weights = pool(kinds, steps=steps)
    scaling = {"m0": 0.5, "m1": -0.5, "m2": 0.5, "m4": 0.5}
    if kinds == (FULL,) and not steps:
        scaling = {"m0": 0.9, "m1": -0.4, "m2": 0.3, "m4": 0.31}
    for to, tolerance in ((FULL, 1e-6), (HALF, 2**-8)):
        ours = merge(method, weights, scaling, parameters, dtype=to)
        theirs = merge(method, widened(weights), scaling, parameters, dtype=to)
        for name, value in ours.items():
            error = (value.double() - theirs[name].double()).abs()
            assert (error <= tolerance * (theirs[name].double().abs() + 1)).all(), name


@pytest.mark.parametrize("entries", ["all", "elected"])
def test_chunks_are_bit_for_bit_the_whole(entries, merge):
    weights = pool((HALF, FULL), sizes=(3001,))
    scaling = {"m0": 0.9, "m1": -0.4, "m3": 0.31}
    for method, parameters in (("dare", {"entries": entries}), ("task_arithmetic", {})):
        whole = merge(method, weights, scaling, parameters)["w0"]
        for start, stop in ((0, 700), (700, 1733), (1733, 3001)):
            cut = {m: value[start:stop] for m, value in weights[0].members.items()}
            part = replace(weights[0], base=weights[0].base[start:stop], members=cut, start=start)
            assert torch.equal(merge(method, [part], scaling, parameters)["w0"], whole[start:stop])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [FULL, HALF, SHORT])
@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_what_is_not_finite_is_found_in_any_member(method, parameters, kind, bad, merge):
    weights = pool((kind,), sizes=(600, 40))
    assert all(is_finite(value) for w in weights for value in w.members.values())
    weights[0].members["m2"][555] = bad
    assert not is_finite(weights[0].members["m2"])
    merged = merge(method, weights, dict.fromkeys(weights[0].members, 0.3), parameters)
    assert not merged["w0"][555].isfinite()
    assert not is_finite(merged["w0"])
    assert is_finite(merged["w0"][:555])
    assert is_finite(merged["w1"])


@pytest.mark.parametrize("kinds", [(FULL,), (HALF,), (SHORT,), (FULL, HALF)])
def test_magnitudes_are_counted_as_torch_counts_them(kinds):
    (weight,) = pool(kinds, members=2, sizes=(40_003,))
    (wide,) = widened([weight])
    band = (0x3DA00000, 0x3DC80000)
    requested = [("m0", band), ("m1", band), ("m0", (0, magnitude_histogram.INFINITE)), ("m1", (5, 6))]
    for ours, theirs in zip(
        magnitude_histogram.tallies(weight, requested, Scratch()),
        magnitude_histogram.tallies(wide, requested, Scratch()),
        strict=True,
    ):
        assert ours.above == theirs.above
        assert (ours.keys == theirs.keys).all()
        assert (ours.reaching == theirs.reaching).all()
    ours, theirs = (magnitude_histogram.histogram(w, "m1", Scratch()) for w in (weight, wide))
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.counts, theirs.counts)
    assert int(ours.counts.sum()) == 40_003


@pytest.mark.parametrize("members", [1, 3, 4, 8])
def test_inner_products_are_those_of_float64(members):
    (weight,) = pool((HALF, FULL), members, sizes=(3001,))
    rows = torch.stack([value.double() - weight.base.double() for value in weight.members.values()])
    rows = torch.cat([rows, weight.base.double()[None]])
    lengths = rows.norm(dim=1)
    error = (inner_products([weight])["w0"] - rows @ rows.T).abs() / lengths / lengths[:, None]
    assert error.max() < 1e-6


@pytest.mark.parametrize("kinds", [(FULL,), (HALF,), (SHORT,), (FULL, HALF, SHORT)])
def test_distances_are_those_of_float64(kinds):
    for weight in pool(kinds):
        base = weight.base.double()
        expected = [float((value.double() - base).square().sum()) for value in weight.members.values()]
        result = cpu.squares(weight.base, list(weight.members.values()))
        assert result == pytest.approx([*expected, float(base.square().sum())], rel=1e-6)


def test_random_numbers_of_the_loops_are_chance_s_also_beyond_32_bits():
    size, level = 2000, 20_000
    for offset in (0, 7, 2**33 - 1001):
        keys = [random_masks.keys(3, member, "w") for member in ("a", "b")]
        out = torch.empty(2, size)
        for row, key in zip(out, keys, strict=True):
            rule = cpu.Rule([1.0], "all", keys=[key], level=level, offset=offset)
            cpu.combine(torch.zeros(size), [torch.ones(size)], row, rule)
        drawn = [torch.from_numpy(random_masks.drawn(*key, offset, offset + size).astype("int64")) for key in keys]
        assert torch.equal(out == 0, torch.stack(drawn) < level)
        assert not torch.equal(out[0], out[1])


def test_threads_share_the_work_and_change_nothing():
    g = torch.Generator().manual_seed(2)
    values = [torch.randn(3 * cpu.CHUNK + 77, generator=g) for _ in range(3)]
    merged = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            merged.append(torch.empty_like(values[0]))
            weighted_sum([(value, 0.4) for value in values], merged[-1], Scratch())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*merged)
    assert torch.allclose(merged[0], 0.4 * sum(values), atol=1e-6)


def test_what_the_loops_do_not_take_is_left_to_torch():
    plain = torch.zeros(8)
    assert cpu.fits(plain, plain.bfloat16())
    assert not cpu.fits(plain.double())
    assert cpu.fits(plain, plain.half())
    assert is_finite(plain[:0])
    assert not cpu.fits(torch.zeros(16)[::2])
    odd = torch.zeros(33, dtype=torch.uint8).numpy()[1:]
    assert not cpu.fits(torch.frombuffer(odd.data, dtype=torch.float32))
