"""Sketches of Grams: their definition in float64, sums of parts, and what every reader makes of one."""

import pytest
import torch

from merging.errors import MethodError
from merging.kernels.gram_sketch import add_rows, dense, diagonal, extents, is_sketch, random_vectors, stored_shape
from merging.methods import Weight
from merging.methods.least_squares.blocks import blocks_of
from merging.testing.weights import MEMBERS, complete, make_weights, merge

WIDTH, RANK = 240, 30


def rows_of(count=400, width=WIDTH, seed=0, scale=1.0):
    """Rows whose Gram has a few large eigenvalues and many small ones, one input a thousand times the others."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    values = torch.randn(count, width, generator=g, dtype=torch.float64) / (1 + torch.arange(width)).double()
    rows = values @ mix
    rows[:, 0] *= scale
    return rows


def sketched(rows, rank=RANK, dtype=torch.float32):
    sketch = torch.zeros(stored_shape(rows.shape[-1], rank), dtype=dtype)
    add_rows(sketch, rows.to(dtype), random_vectors(rows.shape[-1], rank).to(dtype))
    return sketch


def nystrom(gram, rank):
    """The definition, with a pseudo-inverse."""
    omega = random_vectors(len(gram), rank).double()
    products = gram @ omega
    low = products @ torch.linalg.pinv(omega.T @ products, hermitian=True) @ products.T
    return low + torch.diag(gram.diagonal() - low.diagonal())


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 1e-3), (1000.0, 5e-2)])
def test_is_its_definition(scale, tolerance):
    rows = rows_of(scale=scale)
    gram = rows.T @ rows
    sketch = sketched(rows)
    assert is_sketch(sketch)
    assert extents(sketch.shape) == (WIDTH, WIDTH)
    root = torch.outer(gram.diagonal(), gram.diagonal()).sqrt()
    torch.testing.assert_close(dense(sketch) / root, nystrom(gram, RANK) / root, rtol=0, atol=tolerance)
    torch.testing.assert_close(dense(sketch).diagonal(), gram.diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(diagonal(sketch).double(), gram.diagonal(), rtol=1e-5, atol=0)


def test_is_a_gram_and_below_the_whole_one_but_for_its_diagonal():
    rows = rows_of()
    gram, whole = rows.T @ rows, dense(sketched(rows))
    assert torch.linalg.eigvalsh(whole).min() >= 0
    rest = gram - whole
    rest.diagonal().zero_()
    assert torch.linalg.norm(rest) < 0.1 * torch.linalg.norm(gram)
    assert torch.linalg.norm(rest) < torch.linalg.eigvalsh(gram)[: -RANK // 2].sum()


def test_of_low_rank_it_is_exact():
    rows = rows_of(count=4)
    torch.testing.assert_close(dense(sketched(rows, dtype=torch.float64)), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_of_nothing_it_is_zero_but_for_no_input():
    assert not dense(torch.zeros(stored_shape(WIDTH, RANK))).any()


def test_only_wide_layers_are_sketched():
    assert stored_shape(WIDTH, None) == stored_shape(WIDTH, WIDTH // 4 + 1) == (WIDTH, WIDTH)
    assert stored_shape(WIDTH, WIDTH // 4) == (WIDTH + WIDTH // 4, WIDTH // 4 + 1)


def test_a_damaged_one_is_refused():
    sketch = sketched(rows_of())
    sketch[WIDTH:, :-1] *= -1
    with pytest.raises(MethodError, match="damaged"):
        dense(sketch)


def with_sketches(weights, rank=2):
    """Every wide Gram as a sketch, and as what that stands for."""
    kept, whole = [], []
    shared = {}
    for weight in weights:
        grams = weight.statistics.get("gram", {})
        own = {}
        for member, gram in grams.items():
            if stored_shape(len(gram), rank) == tuple(gram.shape):
                own[member] = gram, gram
                continue
            if id(gram) not in shared:
                rows = torch.linalg.cholesky(gram.double() + 1e-6 * torch.eye(len(gram))).T
                sketch = sketched(rows, rank)
                shared[id(gram)] = sketch, dense(sketch)
            own[member] = shared[id(gram)]
        for place, values in ((0, kept), (1, whole)):
            statistics = dict(weight.statistics)
            if own:
                statistics["gram"] = {member: pair[place] for member, pair in own.items()}
            values.append(Weight(weight.name, weight.base, weight.members, statistics, transposed=weight.transposed))
    return kept, whole


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("regmean", {}),
        ("regmean", {"rho": 1.0, "beta": 0.1}),
        ("regmean", {"factors": "gram"}),
        ("mats", {}),
        ("mats", {"subspace": "kfac"}),
        ("mats", {"preconditioner": "kfac"}),
        ("esm", {}),
    ],
)
def test_methods_merge_by_what_a_sketch_stands_for(method, parameters):
    kept, whole = with_sketches(make_weights())
    assert sum(is_sketch(gram) for weight in kept for gram in weight.statistics.get("gram", {}).values()) >= 12
    scaling = dict(zip(MEMBERS, (0.4, 0.9, 1.1, 0.7), strict=True))
    settings = complete(method, scaling, parameters)
    expected = merge(method, whole, scaling, settings)
    for name, value in merge(method, kept, scaling, settings).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_sketch_of_another_layer_is_refused():
    kept, _ = with_sketches(make_weights())
    wrong = next(w for w in kept if w.name == "layer.1.wide.weight")
    statistics = {"gram": {m: torch.zeros(21, 3) for m in MEMBERS}}
    with pytest.raises(MethodError, match="another model"):
        merge("regmean", [Weight(wrong.name, wrong.base, wrong.members, statistics)], dict.fromkeys(MEMBERS, 1.0))


def test_joined_experts_have_a_sketch_each():
    experts = torch.randn(3, 4, WIDTH)
    sketches = torch.stack([sketched(rows_of(seed=seed)) for seed in range(3)])
    views = blocks_of(Weight("experts", experts, {"a": experts}, {"gram": {"a": sketches}}))
    assert [view.base.shape for view in views] == [(4, WIDTH)] * 3
    for view, sketch in zip(views, sketches, strict=True):
        assert view.statistics["gram"]["a"] is not None
        assert torch.equal(dense(view.statistics["gram"]["a"]), dense(sketch))
    torch.testing.assert_close(dense(sketches), torch.stack([dense(sketch) for sketch in sketches]))
