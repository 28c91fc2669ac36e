from dataclasses import replace

import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe

SCALING = {"amazon": 0.7, "movie": 0.4, "nyt": 1.1, "tweets": 0.25}
ONES = dict.fromkeys(SCALING, 1.0)


def linear(seed, grams, inputs=6, outputs=4, transposed=False):
    g = torch.Generator().manual_seed(seed)
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    base = torch.randn(shape, generator=g)
    values = {m: base + 0.1 * torch.randn(shape, generator=g) for m in grams}
    return Weight("layer.weight", base, values, {"gram": grams}, transposed)


def gram(seed, rows=50, inputs=6):
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rows


def run(weight, scaling, **parameters):
    prepared = METHODS["regmean"].prepare([weight], Context())
    out = {weight.name: torch.empty(weight.base.shape)}
    prepared.merge(scaling, {"rho": 0.9, "factors": "gram"} | parameters, out)
    return out[weight.name], prepared.report()


def test_it_is_the_least_squares_fit_to_what_the_members_put_out():
    g = torch.Generator().manual_seed(0)
    x = {m: torch.randn(40, 6, generator=g, dtype=torch.float64) for m in ("a", "b")}
    weight = linear(1, {m: (v.T @ v / 40).float() for m, v in x.items()})
    outputs = [x[m] @ weight.members[m].double().T for m in x]
    fit = torch.linalg.lstsq(torch.cat(list(x.values())), torch.cat(outputs)).solution.T
    merged, _ = run(weight, {"a": 1.0, "b": 1.0}, rho=1.0)
    torch.testing.assert_close(merged.double(), fit, rtol=1e-5, atol=1e-6)


def test_equal_grams_give_the_mean(make_pool, merge, assert_close):
    weights = make_pool()
    for w in weights:
        if "gram" in w.statistics:
            w.statistics["gram"].update(dict.fromkeys(SCALING, w.statistics["gram"]["nyt"]))
    assert_close(merge("regmean", weights, ONES), merge("average", weights, ONES))


def test_rho_zero_weighs_inputs_by_their_power():
    weight = linear(2, {"a": gram(3), "b": gram(4)})
    merged, _ = run(weight, {"a": 1.0, "b": 2.0}, rho=0.0)
    power = {m: a * weight.statistics["gram"][m].diagonal() for m, a in (("a", 1.0), ("b", 2.0))}
    expected = sum(power[m] * weight.members[m] for m in power) / sum(power.values())
    torch.testing.assert_close(merged, expected)


def test_equal_factors_agree_with_the_float64_reference(make_pool, merge, complete, reference, assert_close):
    weights = make_pool(23)
    for factors in ("contribution", "gram"):
        scaling = dict.fromkeys(SCALING, 0.7)
        parameters = complete("regmean", scaling, {"factors": factors})
        expected = reference.regmean(weights, scaling, parameters, {})
        assert_close(merge("regmean", weights, scaling, {"factors": factors}), expected)


def test_contributions_of_all_members_add_up_to_what_all_move_by_together(make_pool, merge, assert_close):
    weights = make_pool()
    alone = [merge("regmean", weights, {m: float(m == member) for m in SCALING}) for member in SCALING]
    added = {w.name: w.base + sum(merged[w.name] - w.base for merged in alone) for w in weights}
    assert_close(merge("regmean", weights, ONES), added, 1e-6)
    double = merge("regmean", weights, dict.fromkeys(SCALING, 2.0))
    assert_close(double, {w.name: 2 * added[w.name] - w.base for w in weights}, 2e-6)


@pytest.mark.parametrize("scaling", [ONES, SCALING])
def test_condition_of_a_hundred_million_is_no_harm(scaling, merge, complete, reference, assert_close):
    g = torch.Generator().manual_seed(24)
    turn, _ = torch.linalg.qr(torch.randn(48, 48, generator=g, dtype=torch.float64))
    power = torch.logspace(0, -8, 48, dtype=torch.float64)
    spectra = {m: power * (0.5 + torch.rand(48, generator=g, dtype=torch.float64)) for m in SCALING}
    weight = linear(25, {m: turn * spectrum @ turn.T for m, spectrum in spectra.items()}, 48, 32)
    for factors in ("contribution", "gram"):
        given = {"rho": 1.0, "factors": factors}
        expected = reference.regmean([weight], scaling, complete("regmean", scaling, given), {})
        assert_close(merge("regmean", [weight], scaling, given), expected)


def test_a_recipe_gives_the_same_bits_whatever_was_merged_before_it(make_pool):
    weights = make_pool()
    some = {"nyt": 1.0, "movie": 1.0}
    recipes = [
        (scaling, {"rho": rho, "factors": factors})
        for scaling in (ONES, SCALING, some, {"nyt": 0.5, "movie": 0.7})
        for rho in (0.9, 0.5)
        for factors in ("contribution", "gram")
    ]

    def merged(prepared, recipe):
        out = {w.name: torch.empty(w.base.shape) for w in weights}
        prepared.merge(*recipe, out)
        return torch.cat([value.reshape(-1) for value in out.values()])

    alone = [merged(METHODS["regmean"].prepare(weights, Context()), recipe) for recipe in recipes]
    assert len({tuple(value.tolist()) for value in alone}) >= 12  # gram is contribution where all is 1
    prepared = METHODS["regmean"].prepare(weights, Context())
    for number in (*range(16), *reversed(range(16)), *range(0, 16, 3)):
        assert torch.equal(merged(prepared, recipes[number]), alone[number]), recipes[number]


@pytest.mark.parametrize("scaling", [ONES, SCALING])
def test_parts_merged_apart_are_the_whole_to_the_bit(scaling, make_pool, merge):
    weights = make_pool(26, width=24)
    whole = merge("regmean", weights, scaling)
    for parts in (2, 5):
        split = merge("regmean", weights, scaling, parts=parts)
        assert all(torch.equal(split[name], value) for name, value in whole.items())


def test_the_ridge_is_that_of_the_candidate_and_not_of_the_one_before():
    weight = linear(27, {m: gram(28, rows=2) for m in ("a", "b")})
    prepared = METHODS["regmean"].prepare([weight], Context())
    ridges = []
    for factor in (1.0, 0.5):
        for rho in (1.0, 0.9):
            for factors in ("contribution", "gram"):
                out = {weight.name: torch.empty(weight.base.shape)}
                prepared.merge({"a": 1.0, "b": factor}, {"rho": rho, "factors": factors}, out)
                ridges.append(prepared.report()["ridge"] > 0)
    assert ridges == [True, True, False, False] * 2


def test_conv1d_is_the_transposed_linear_layer_also_where_it_is_square():
    grams = {"a": gram(5), "b": gram(6)}
    weight = linear(7, grams, outputs=6)
    turned = Weight("layer.weight", weight.base.T, {m: v.T for m, v in weight.members.items()}, {"gram": grams}, True)
    merged, _ = run(weight, {"a": 1.0, "b": 0.5})
    again, _ = run(turned, {"a": 1.0, "b": 0.5})
    torch.testing.assert_close(again.T, merged)


def test_layers_that_share_a_gram_get_what_each_gets_alone(make_pool, merge, assert_close):
    weights = make_pool()
    apart = [
        replace(w, statistics={k: {m: v.clone() for m, v in s.items()} for k, s in w.statistics.items()})
        for w in weights
    ]
    assert_close(merge("regmean", weights, SCALING), merge("regmean", apart, SCALING), 1e-6)


def test_an_input_that_nobody_ever_saw_gets_the_mean_and_the_ridge_is_reported():
    grams = {"a": gram(8), "b": gram(9)}
    for value in grams.values():
        value[2] = value[:, 2] = 0.0
    weight = linear(10, grams)
    merged, report = run(weight, {"a": 1.0, "b": 1.0}, rho=1.0)
    mean = (weight.members["a"] + weight.members["b"]) / 2
    torch.testing.assert_close(merged[:, 2], mean[:, 2])
    assert 0 < report["ridge"] <= 1e-5
    assert report["ridged_layers"] == 1


def test_fewer_tokens_than_inputs_stay_close_to_the_members():
    weight = linear(11, {"a": gram(12, rows=2), "b": gram(13, rows=2)})
    merged, report = run(weight, {"a": 1.0, "b": 1.0}, rho=1.0)
    assert report["ridge"] > 0
    assert (merged - weight.base).norm() < 3 * max((v - weight.base).norm() for v in weight.members.values())
    regular, quiet = run(weight, {"a": 1.0, "b": 1.0}, rho=0.9)
    assert regular.isfinite().all()
    assert quiet == {"ridge": 0.0, "ridged_layers": 0.0}


@pytest.mark.parametrize(("inputs", "rows"), [(6, 2), (24, 9), (64, 16)])
def test_what_float32_grams_do_not_know_is_the_mean_on_any_processor(inputs, rows):
    """Whether a Cholesky comes through a singular float32 matrix is a matter of rounding; 20 draws see both."""
    for seed in range(20):
        grams = {m: gram(2 * seed + number, rows, inputs) for number, m in enumerate(("a", "b"))}
        weight = linear(seed, grams, inputs=inputs)
        merged, report = run(weight, {"a": 1.0, "b": 1.0}, rho=1.0)
        assert 0 < report["ridge"] <= 1e-3
        assert (merged - weight.base).norm() < 3 * max((v - weight.base).norm() for v in weight.members.values())
        whole = sum(grams.values()).double()
        size = whole.diagonal().sqrt()  # the ridge is a share of the diagonal
        _, vectors = torch.linalg.eigh(whole / size / size[:, None])
        unseen = vectors[:, : inputs - 2 * rows] * size[:, None]
        mean = (weight.members["a"] + weight.members["b"]).double() / 2
        away = (merged.double() - mean) @ unseen
        assert away.norm() < 0.1 * ((mean - weight.base.double()) @ unseen).norm()


def test_without_a_diagonal_s_help_a_regular_sum_is_solved_as_it_stands(make_pool, merge, reference, assert_close):
    weights = make_pool(1)
    parameters = {"rho": 1.0, "factors": "contribution"}
    assert_close(merge("regmean", weights, SCALING, {"rho": 1.0}), reference.regmean(weights, SCALING, parameters, {}))


def test_matrices_without_a_gram_are_counted_embeddings_left_out():
    g = torch.Generator().manual_seed(0)
    shapes = {"layer.0.mlp.experts.gate_up_proj": (4, 3, 2), "layer.0.norm.weight": (3,), "wte.weight": (7, 3)}
    experts = [Weight(n, torch.randn(s, generator=g), {"a": torch.randn(s, generator=g)}) for n, s in shapes.items()]
    prepared = METHODS["regmean"].prepare([linear(1, {"a": gram(1)}), *experts], Context())
    assert prepared.report() == {"averaged_layers": 1.0}


def test_grams_of_nothing_give_the_mean():
    weight = linear(14, {"a": torch.zeros(6, 6), "b": torch.zeros(6, 6)})
    merged, _ = run(weight, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(merged, (weight.members["a"] + weight.members["b"]) / 2)


@pytest.mark.parametrize("factor", [1e-18, 1e18])
def test_grams_of_any_size_give_the_same(factor):
    weight = linear(15, {"a": gram(16), "b": gram(17)})
    expected, _ = run(weight, {"a": 1.0, "b": 1.0})
    sized = replace(weight, statistics={"gram": {m: v * factor for m, v in weight.statistics["gram"].items()}})
    merged, report = run(sized, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(merged, expected)
    assert report["ridge"] == 0


def test_inputs_of_very_different_size_are_solved_as_one_would_expect():
    size = torch.logspace(-6, 6, 6)
    grams = {m: size[:, None] * gram(seed) * size for m, seed in (("a", 18), ("b", 19))}
    weight = linear(20, grams)
    merged, report = run(weight, {"a": 1.0, "b": 0.5})
    soft = {m: 0.9 * g.double() + 0.1 * g.double().diag().diag() for m, g in grams.items()}
    left = soft["a"] + 0.5 * soft["b"]
    right = soft["a"] @ weight.members["a"].double().T + 0.5 * soft["b"] @ weight.members["b"].double().T
    scale = left.diag().sqrt()
    expected = (torch.linalg.solve(left / scale / scale[:, None], right / scale[:, None]) / scale[:, None]).T
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)
    assert report["ridge"] == 0


def test_negative_factors_that_cancel_the_grams_are_refused():
    weight = linear(21, {"a": gram(22), "b": gram(23)})
    with pytest.raises(MethodError, match=r"'layer\.weight' is not positive semi-definite"):
        run(weight, {"a": 1.0, "b": -5.0})


def test_a_gram_on_a_bias_is_refused():
    weight = Weight("bias", torch.zeros(4), {"a": torch.ones(4)}, {"gram": {"a": torch.ones(4, 4)}})
    with pytest.raises(MethodError, match="'bias' has shape"):
        METHODS["regmean"].prepare([weight], Context())


@pytest.mark.parametrize(("model_type", "rho"), [("bert", 0.9), ("", 0.9), ("t5", 0.1), ("mt5", 0.1)])
@pytest.mark.parametrize("method", ["regmean", "lines+regmean"])
def test_rho_follows_the_architecture_unless_it_is_given(model_type, rho, method):
    recipe = METHODS[method].complete(Recipe(method, {"a": 1.0}), model_type)
    assert recipe.parameters["rho"] == rho
    assert METHODS[method].default_recipe(["a"], model_type).parameters["rho"] == rho
    assert METHODS[method].complete(Recipe(method, {"a": 1.0}, {"rho": 0.5}), model_type).parameters["rho"] == 0.5
