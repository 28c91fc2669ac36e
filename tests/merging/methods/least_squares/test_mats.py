from functools import reduce

import pytest
import torch

from merging.errors import MethodError
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe

EXAMPLES = {"amazon": 300, "movie": 120, "nyt": 50, "tweets": 700, "base": 1000}
SCALING = {"amazon": 0.7, "movie": 0.4, "nyt": 1.1, "tweets": 0.25}
CONVERGED = {"iterations": 2000, "tolerance": 1e-13, "preconditioner": "jacobi"}


@pytest.mark.parametrize("start", ["average", "base", "task_arithmetic", "gradient_matching", "regmean"])
def test_grams_run_to_convergence_are_regmean_from_any_start(start, make_pool, merge, assert_close):
    weights = [w for w in make_pool() if "gram" in w.statistics]
    solved = merge("mats", weights, SCALING, {**CONVERGED, "start": start})
    assert_close(solved, merge("regmean", weights, SCALING, {"rho": 1.0, "factors": "gram"}), 1e-4)


def test_diagonal_fishers_run_to_convergence_are_fisher_averaging(make_pool, merge, assert_close):
    weights = [w for w in make_pool() if "fisher" in w.statistics]
    for w in weights:
        for fisher in w.statistics["fisher"].values():
            fisher.clamp_(min=1e-5)
    solved = merge("mats", weights, SCALING, {**CONVERGED, "subspace": "fisher"})
    assert_close(solved, merge("fisher", weights, SCALING, {"normalize": False}))


def test_the_identity_is_the_weighted_mean(make_pool, merge, assert_close):
    weights = make_pool()
    assert_close(merge("mats", weights, SCALING, {"subspace": "identity"}), merge("average", weights, SCALING))


def test_no_steps_leave_the_start(make_pool, merge, assert_close):
    weights = [w for w in make_pool() if "gram" in w.statistics]
    started = merge("mats", weights, SCALING, {"iterations": 0, "start": "regmean"})
    ones = dict.fromkeys(SCALING, 1.0)
    assert_close(started, merge("regmean", weights, ones), 1e-6)


def test_a_propagated_start_brings_its_biases(make_pool, merge):
    weights = make_pool()
    for number, w in enumerate(weights):
        torch.manual_seed(number)
        w.statistics["propagated"] = {"+".join(sorted(SCALING)): w.base + torch.randn(w.base.shape)}
    untouched = merge("mats", weights, SCALING, {"iterations": 0, "start": "regmean_propagated"})
    moved = merge("mats", weights, SCALING, {"iterations": 5, "start": "regmean_propagated"})
    for w in weights:
        (solution,) = w.statistics["propagated"].values()
        torch.testing.assert_close(untouched[w.name], solution, rtol=0, atol=1e-6)
        assert torch.equal(moved[w.name], untouched[w.name]) == ("gram" not in w.statistics)


def test_the_residual_of_every_weight_is_reported_and_falls(make_pool, complete):
    weights = make_pool()
    prepared = METHODS["mats"].prepare(weights, Context())
    out = {w.name: torch.empty(w.base.shape) for w in weights}
    residuals = []
    for iterations in (0, 5, 100):
        prepared.merge(SCALING, complete("mats", SCALING, {"iterations": iterations}), out)
        report = prepared.report()
        assert {f"residual.{w.name}" for w in weights if "gram" in w.statistics} | {"residual"} == report.keys()
        residuals.append(report["residual"])
    assert residuals[0] > residuals[1] > residuals[2]


def test_a_subspace_without_its_statistic_is_refused(make_pool, merge):
    weights = make_pool()
    for w in weights:
        w.statistics.pop("output_gram", None)
    with pytest.raises(MethodError, match="subspace 'kfac' needs the output_gram statistic"):
        merge("mats", weights, SCALING, {"subspace": "kfac"})


def test_factors_that_make_a_system_indefinite_are_refused_before_anything_is_written(make_pool, complete):
    weights = make_pool()
    out = {w.name: torch.full(w.base.shape, 7.0) for w in weights}
    scaling = {"amazon": 1.0, "nyt": -0.9}
    with pytest.raises(MethodError, match="indefinite"):
        METHODS["mats"].prepare(weights, Context()).merge(scaling, complete("mats", scaling), out)
    assert all(bool((value == 7.0).all()) for value in out.values())


def test_weights_without_the_statistic_are_the_plain_mean(make_pool, merge, assert_close):
    weights = [w for w in make_pool() if "gram" not in w.statistics]
    gram = next(w for w in make_pool() if "gram" in w.statistics)
    merged = merge("mats", [*weights, gram], SCALING)
    ones = dict.fromkeys(SCALING, 1.0)
    assert_close({w.name: merged[w.name] for w in weights}, merge("average", weights, ones))


@pytest.mark.parametrize("preconditioner", ["none", "jacobi"])
@pytest.mark.parametrize("tolerance", [1e-5, 0.0])
@pytest.mark.parametrize(("classes", "tokens"), [(2, 60), (5, 60), (5, 12), (40, 6)])
def test_kfac_leaves_alone_what_a_softmax_does_not_see(classes, tokens, tolerance, preconditioner):
    """A constant added to all logits changes nothing, so that the mean over classes stays the start's."""
    generator = torch.Generator().manual_seed(classes)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base, members, grams, outputs = 0.3 * randn(classes, 24), {}, {}, {}
    for name in "abc":
        members[name] = base + 0.3 * randn(classes, 24)
        x = (0.3 * randn(tokens, 24) @ randn(24, 24)).double()
        p = (3 * x @ members[name].double().T).softmax(-1)
        roots = p.sqrt()[:, :, None] * (torch.eye(classes) - p[:, None, :])
        grams[name], outputs[name] = (x.T @ x / tokens).float(), ((roots.mT @ roots).sum(0) / tokens).float()
    weight = Weight("head", base, members, {"gram": grams, "output_gram": outputs})
    out = {"head": torch.empty_like(base)}
    method = METHODS["mats"]
    recipe = method.complete(method.default_recipe(list("abc")))
    changes = {"subspace": "kfac", "iterations": 200, "tolerance": tolerance, "preconditioner": preconditioner}
    method.prepare([weight], Context()).merge(recipe.scaling, recipe.parameters | changes, out)
    mean = sum(members.values()) / 3
    torch.testing.assert_close(out["head"].mean(0), mean.mean(0), rtol=0, atol=5e-6)
    assert 1e-2 < float((out["head"] - mean).norm() / (mean - base).norm()) < 3


@pytest.mark.parametrize(
    "start", ["fisher", "lines+ties", "ties", "breadcrumbs", "iso_c", "multi_slerp", "lines+regmean"]
)
@pytest.mark.parametrize("parts", [1, 3])
def test_any_method_s_result_may_be_the_start(start, parts, make_pool, assert_close):
    """No steps leave it; of parts that are never together, whatever is passed over and asked for besides."""
    weights = [w for w in make_pool() if "gram" in w.statistics]
    mats, other = METHODS["mats"], METHODS[start]
    recipe = mats.complete(Recipe("mats", SCALING, {"iterations": 0, "start": start}))
    pieces = [weights[i::parts] for i in range(parts)]
    global_stats = reduce(mats.combine, [mats.global_pass(piece) for piece in pieces])
    while parts > 1 and (
        answers := [
            a for piece in pieces if (a := mats.second_pass(piece, global_stats, recipe.parameters)) is not None
        ]
    ):
        global_stats = reduce(mats.combine, answers, global_stats)
    out, expected = ({w.name: torch.empty(w.base.shape) for w in weights} for _ in range(2))
    for piece in pieces:
        prepared = mats.prepare(piece, Context(EXAMPLES, global_stats))
        prepared.merge(recipe.scaling, recipe.parameters, {w.name: out[w.name] for w in piece})
    own = other.default_recipe(list(SCALING))
    other.prepare(weights, Context(EXAMPLES)).merge(own.scaling, own.parameters, expected)
    assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("start", ["mats", "lines+mats"])
def test_a_start_is_another_method(start):
    with pytest.raises(MethodError, match="cannot begin at its own result"):
        METHODS["mats"].complete(Recipe("mats", SCALING, {"start": start}))
    with pytest.raises(MethodError, match="Did you mean 'regmean'"):
        METHODS["mats"].complete(Recipe("mats", SCALING, {"start": "regmeam"}))


@pytest.mark.parametrize(
    "parameters", [{}, {"start": "regmean", "iterations": 3}, {"subspace": "fisher", "iterations": 2}]
)
def test_a_factor_of_nothing_leaves_a_member_out(parameters, make_pool, merge, subset, assert_close):
    weights = make_pool()
    others = {"amazon": 0.7, "nyt": 1.1}
    actual = merge("mats", weights, {**others, "movie": 0.0}, parameters)
    assert_close(actual, merge("mats", subset(weights, list(others)), others, parameters), 1e-6)


def test_a_kronecker_preconditioner_needs_fewer_steps(make_pool, complete):
    """The same solution; its residual after a few steps is that of many more without it."""
    weights = [w for w in make_pool() if w.statistics.get("output_gram")]

    def residual(preconditioner, iterations):
        prepared = METHODS["mats"].prepare(weights, Context())
        parameters = {"subspace": "kfac", "iterations": iterations, "preconditioner": preconditioner, "tolerance": 0.0}
        out = {w.name: torch.empty(w.base.shape) for w in weights}
        prepared.merge(SCALING, complete("mats", SCALING, parameters), out)
        return prepared.report()["residual"]

    assert residual("kfac", 10) < 0.1 * residual("none", 10)
    assert residual("kfac", 10) < residual("none", 40)


def test_a_kronecker_preconditioner_of_no_grams_is_refused(make_pool, merge):
    for changes, message in (({"subspace": "fisher"}, "needs Grams"), ({}, "factors ≥ 0")):
        scaling = SCALING | {"nyt": -0.1} if not changes else SCALING
        with pytest.raises(MethodError, match=message):
            merge("mats", make_pool(), scaling, {"preconditioner": "kfac", **changes})
