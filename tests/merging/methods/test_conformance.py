"""What every registered method must do; a new one is tested here as soon as it is registered."""

import copy

import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS, Context

# A method that scales a solution of all members together has tests of its own (least_squares/test_precomputed.py).
EVERY = sorted(name for name in METHODS if METHODS[name].solution is None)
FACTORS = {"amazon": 0.71, "movie": 0.43, "nyt": 1.13, "tweets": 0.257}
VARIANTS = [
    ("ties", {"trim": "tensor", "disjoint": "sum", "lambda": 0.6}),
    ("ties", {"density": 1.0}),
    ("fisher", {"normalize": True}),
    ("gradient_matching", {"base_curvature": "fisher"}),
    ("gradient_matching", {"delta": 1e-6}),
    ("regmean", {"factors": "gram", "rho": 0.5}),
    ("regmean", {"beta": 0.3, "rho": 1.0}),
    ("linear", {"normalize": True}),
    ("dare", {"entries": "elected", "drop": 0.3, "seed": 7}),
    ("dare", {"drop": 0.0}),
    ("dare", {"entries": "elected_mean", "lambda": 0.7}),
    ("dare", {"rescale": "l1", "entries": "elected_mean", "drop@movie": 0.7}),
    ("dare", {"rescale": "none", "drop@movie": 0.2}),
    ("dare", {"drop@movie": 0.8}),
    ("della", {"rescale": "l1", "density@movie": 0.7, "lambda": 1.2}),
    ("della", {"rescale": "none", "entries": "elected_mean", "epsilon@movie": 0.3}),
    ("ties", {"density@movie": 0.7}),
    ("ties", {"density@movie": 0.1, "trim": "tensor"}),
    ("breadcrumbs", {"entries": "elected_mean", "density@movie": 0.4, "gamma@movie": 0.2, "lambda": 0.6}),
    ("della", {"entries": "elected", "seed": 3}),
    ("breadcrumbs", {"entries": "elected", "density": 0.4, "gamma": 0.1}),
    ("breadcrumbs", {"gamma": 0.0}),
    ("consensus", {"k": 3, "lambda": 0.2}),
    ("slerp", {"space": "task_vectors"}),
    ("nearswap", {"t": 0.05}),
    ("ram", {"epsilon": 0.1}),
    ("ram_plus", {"epsilon": 0.1, "alpha": 2.0, "r": 0.5}),
    ("sce", {"select": 0.5, "lambda": 0.7}),
    ("sce", {"select": 1.0}),
    ("nuslerp", {"over": "rows"}),
    ("nuslerp", {"over": "columns", "space": "weights"}),
    ("model_stock", {"over": "rows"}),
    ("mats", {"iterations": 5}),
    ("mats", {"subspace": "identity"}),
    ("mats", {"subspace": "fisher", "iterations": 8}),
    ("mats", {"subspace": "kfac", "iterations": 6, "tolerance": 0.0}),
    ("mats", {"subspace": "kfac", "iterations": 6, "preconditioner": "jacobi"}),
    ("mats", {"preconditioner": "jacobi", "iterations": 8}),
    ("regmean", {"rho": 0.999}),
    ("iso_c", {"rank": 0.5}),
    ("tsv_m", {"rank": 0.5}),
    ("iso_cts", {"common": 0.5}),
    ("ace", {"epsilon": 0.04, "refine": True}),
    ("wudi", {"filter": 0.05}),
    ("esm", {"layers": False}),
    ("svc+task_arithmetic", {}),
    ("svc+ties", {"density": 0.5}),
    ("svc+lines+ties", {"density": 0.5}),
    ("lines+svc+iso_cts", {}),
]
CASES = [(name, {}) for name in EVERY] + VARIANTS
IDENTICAL = {  # parameters and factor (per member, of 4) at which members that are all one must give that one
    "average": ({}, 1.0),
    "task_arithmetic": ({}, 0.25),
    "ties": ({"density": 1.0}, 1.0),
    "fisher": ({}, 1.0),
    "gradient_matching": ({}, 0.25),
    "regmean": ({}, 1.0),
    "linear": ({}, 0.25),
    "lines": ({"a": 1.0, "b": 0.0}, 0.25),
    "consensus": ({"lambda": 0.2, "k": 4}, 0.25),
    "dare": ({"drop": 0.0}, 0.25),
    "breadcrumbs": ({"density": 1.0, "gamma": 0.0}, 0.25),
    "della": ({"density": 1.0, "epsilon": 0.0}, 0.25),
    "slerp": ({}, 1.0),
    "multi_slerp": ({}, 1.0),
    "karcher": ({}, 1.0),
    "nearswap": ({"t": 10.0}, 0.25),
    "ram": ({"epsilon": 0.0}, 1.0),
    "sce": ({}, 1.0),
    "nuslerp": ({"over": "rows"}, 1.0),
    "model_stock": ({}, 1.0),
    "mats": ({}, 1.0),
    "wudi": ({}, 1.0),
}


def factors(name):
    """A scaling factor for each member of the test pool that the method can take."""
    return {m: FACTORS[m] for m in list(FACTORS)[: METHODS[name].most_members]}


def identical(merged, again):
    return all(torch.equal(merged[name], again[name]) for name in merged)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_agrees_with_its_float64_reference(name, parameters, make_pool, merge, complete, reference, assert_close):
    for seed in range(3):
        weights = make_pool(seed)
        examples = {"amazon": 300, "movie": 120, "nyt": 50, "tweets": 700, "base": 1000}
        expected = getattr(reference, name)(weights, factors(name), complete(name, factors(name), parameters), examples)
        assert_close(merge(name, weights, factors(name), parameters, examples=examples), expected)


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16, torch.float16)]
)
def test_reads_any_floating_dtype_and_rounds_once(
    name, parameters, dtypes, make_pool, merge, complete, reference, assert_close
):
    weights = make_pool(5, dtypes=dtypes)
    expected = getattr(reference, name)(weights, factors(name), complete(name, factors(name), parameters), {})
    assert_close(merge(name, weights, factors(name), parameters, examples={}), expected)
    rounded = merge(name, weights, factors(name), parameters, examples={}, dtype=torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in rounded.values())
    full = merge(name, weights, factors(name), parameters, examples={})
    assert identical(rounded, {key: value.to(torch.bfloat16) for key, value in full.items()})


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_order_of_members_does_not_matter(name, parameters, make_pool, merge):
    weights = make_pool(1)
    turned = dict(reversed(factors(name).items()))
    assert identical(merge(name, weights, factors(name), parameters), merge(name, weights, turned, parameters))


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_some_members_of_a_pool_are_a_pool_of_those(name, parameters, make_pool, merge, subset, assert_close):
    weights = make_pool(2)
    some = {"movie": 0.8, "tweets": 0.5}
    merged, expected = merge(name, weights, some, parameters), merge(name, subset(weights, some), some, parameters)
    # inner products of all members are one matrix product, whose rounding depends on how many there are
    assert identical(merged, expected) or name in ("karcher", "model_stock", "multi_slerp", "nuslerp", "slerp")
    assert_close(merged, expected, tolerance=1e-6)


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_merged_apart_are_the_whole(name, parameters, parts, make_pool, merge, assert_close):
    weights = make_pool(3)
    assert_close(
        merge(name, weights, factors(name), parameters, parts=parts),
        merge(name, weights, factors(name), parameters),
        tolerance=1e-6,
    )


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_survey_does_not_depend_on_how_parts_are_combined(name, parameters, make_pool):
    method, weights = METHODS[name], make_pool(3)
    a, b, c = (method.global_pass(weights[i::3]) for i in range(3))
    one, other = method.combine(method.combine(a, b), c), method.combine(c, method.combine(b, a))
    out = [{w.name: torch.empty(w.base.shape) for w in weights} for _ in range(2)]
    recipe = method.default_recipe(list(factors(name)))
    for global_stats, target in zip((one, other), out, strict=True):
        method.prepare(weights, Context(global_stats=global_stats)).merge(recipe.scaling, recipe.parameters, target)
    for key in out[0]:
        torch.testing.assert_close(out[0][key], out[1][key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_repeats_itself_to_the_bit_and_leaves_its_input_alone(name, parameters, make_pool, complete):
    weights = make_pool(4)
    before = copy.deepcopy(weights)
    method = METHODS[name]
    prepared = method.prepare(weights, Context())
    settings = complete(name, factors(name), parameters)
    first = {w.name: torch.empty(w.base.shape) for w in weights}
    second = {w.name: torch.full(w.base.shape, float("nan")) for w in weights}
    prepared.merge(factors(name), settings, first)
    prepared.merge(dict.fromkeys(factors(name), 1.0), complete(name, factors(name)), second)
    prepared.merge(factors(name), settings, second)
    assert identical(first, second)
    for was, now in zip(before, weights, strict=True):
        assert torch.equal(was.base, now.base)
        assert identical(was.members, now.members)
        assert all(identical(was.statistics[kind], now.statistics[kind]) for kind in was.statistics)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_a_candidate_has_the_same_bits_whatever_was_merged_before_it(name, parameters, make_pool, complete):
    weights = make_pool(8)
    every = factors(name)
    scalings = [every, dict.fromkeys(every, 0.6), dict.fromkeys(list(every)[:2], 1.0), dict.fromkeys(every, 0.3)]

    def prepare():
        return METHODS[name].prepare(weights, Context())

    def merged(prepared, scaling):
        out = {w.name: torch.empty(w.base.shape) for w in weights}
        prepared.merge(scaling, complete(name, scaling, parameters), out)
        return torch.cat([value.reshape(-1) for value in out.values()])

    alone = [merged(prepare(), scaling) for scaling in scalings]
    prepared = prepare()
    for turn in (0, 1, 2, 0, 3, 2, 2, 1):
        assert torch.equal(merged(prepared, scalings[turn]), alone[turn]), scalings[turn]


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_writes_into_live_parameters_of_any_layout(name, parameters, make_pool, complete):
    weights = [w for w in make_pool(4) if w.base.dim() == 2]
    prepared = METHODS[name].prepare(weights, Context())
    settings = complete(name, factors(name), parameters)
    plain = {w.name: torch.empty(w.base.shape) for w in weights}
    live = {w.name: torch.nn.Parameter(torch.empty(w.base.shape[::-1])) for w in weights}
    prepared.merge(factors(name), settings, plain)
    prepared.merge(factors(name), settings, {key: value.T for key, value in live.items()})
    assert identical(plain, {key: value.detach().T for key, value in live.items()})


@pytest.mark.parametrize("name", sorted(IDENTICAL))
def test_identical_members_give_that_member(name, make_pool, merge, assert_close):
    weights = make_pool(6)
    for w in weights:
        one = w.members["movie"]
        w.members.update(dict.fromkeys(w.members, one))
    parameters, factor = IDENTICAL[name]
    assert_close(
        merge(name, weights, dict.fromkeys(factors(name), factor), parameters),
        {w.name: w.members["movie"] for w in weights},
    )


@pytest.mark.parametrize("name", sorted(IDENTICAL))
def test_one_member_alone_is_that_member(name, make_pool, merge, assert_close):
    weights = make_pool(7)
    merged = merge(name, weights, {"nyt": 1.0}, IDENTICAL[name][0])
    assert_close(merged, {w.name: w.members["nyt"] for w in weights})


@pytest.mark.parametrize("name", EVERY)
def test_a_member_that_was_not_prepared_is_named(name, make_pool, merge):
    with pytest.raises(MethodError, match=r"'moovie'.*Did you mean 'movie'"):
        merge(name, make_pool(), {"moovie": 1.0})


@pytest.mark.parametrize("name", EVERY)
def test_a_member_of_another_shape_is_named(name, make_pool):
    weights = make_pool()
    weights[1].members["nyt"] = torch.zeros(3, 3)
    with pytest.raises(MethodError, match=r"nyt: 'layer\.0\.query\.weight' has shape"):
        METHODS[name].prepare(weights, Context(global_stats=METHODS[name].global_pass(make_pool())))


@pytest.mark.parametrize("name", EVERY)
def test_a_model_with_other_weights_is_refused(name, make_pool):
    weights = make_pool()
    prepared = METHODS[name].prepare(weights, Context())
    recipe = METHODS[name].default_recipe(list(factors(name)))
    with pytest.raises(MethodError, match=r"there is no weight '.*' to write to"):
        prepared.merge(recipe.scaling, recipe.parameters, {})


@pytest.mark.parametrize("name", EVERY)
def test_default_recipe_is_complete_and_inside_its_ranges(name):
    method = METHODS[name]
    recipe = method.default_recipe(["a", "b"])
    assert method.complete(recipe) == recipe
    assert recipe.parameters.keys() == method.parameters.keys()
    for key, value in recipe.parameters.items():
        spec = method.parameters[key]
        assert spec.choices is not None or spec.low is None or spec.low <= value <= spec.high


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in EVERY for k in METHODS[n].requires])
def test_damaged_statistics_are_refused_by_member_and_weight(name, kind, make_pool):
    def broken(change):
        weights = make_pool()
        weights[1].statistics[kind] = dict(weights[1].statistics[kind])
        change(weights[1].statistics[kind])
        return weights

    damages = {
        "no ": lambda s: s.pop("nyt"),
        "has shape": lambda s: s.update(nyt=torch.ones(2, 2)),
        "NaN": lambda s: s.update(nyt=s["nyt"] * float("nan")),
        "negative": lambda s: s.update(nyt=-s["nyt"]),
    }
    for message, change in damages.items():
        with pytest.raises(MethodError, match=f"nyt: .*{message}") as caught:
            METHODS[name].prepare(broken(change), Context())
        assert "layer.0.query.weight" in str(caught.value)
        assert "again" in str(caught.value)
