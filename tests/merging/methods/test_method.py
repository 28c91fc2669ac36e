import pytest

from merging.errors import MethodError
from merging.methods import METHODS
from merging.recipe import Recipe


@pytest.mark.parametrize(
    ("method", "parameter", "values"),
    [
        ("consensus", "k", (2, 2.0)),
        ("linear", "normalize", (True, 1, 1.0)),
        ("linear", "normalize", (False, 0, 0.0)),
        ("dare", "seed", (3, 3.0)),
        ("dare", "drop", (0, 0.0, -0.0)),
        ("mats", "iterations", (10, 10.0)),
    ],
)
def test_one_value_has_one_identity_however_it_is_written(method, parameter, values):
    recipes = [METHODS[method].complete(Recipe(method, {"a": 1.0}, {parameter: value})) for value in values]
    assert len({recipe.identity for recipe in recipes}) == 1
    assert len({type(recipe.parameters[parameter]) for recipe in recipes}) == 1


def test_scaling_factors_of_one_value_have_one_identity():
    identities = {METHODS["average"].complete(Recipe("average", {"a": 1, "b": b})).identity for b in (0, 0.0, -0.0)}
    assert len(identities) == 1


@pytest.mark.parametrize(
    ("method", "parameter", "value"),
    [
        ("mats", "iterations", 0.9),
        ("dare", "seed", 1.7),
        ("dare", "seed", True),
        ("consensus", "k", True),
        ("consensus", "k", 2.5),
        ("ties", "lambda", float("inf")),
        ("ties", "lambda", float("-inf")),
        ("ties", "lambda", float("nan")),
        ("gradient_matching", "delta", float("inf")),
        ("dare", "seed", 10**400),
        ("dare", "seed", float("inf")),
        ("ties", "disjoint", 1),
        ("ties", "density", "0.2"),
    ],
)
def test_what_is_no_such_number_is_refused(method, parameter, value):
    with pytest.raises(MethodError, match=f"^{parameter} = "):
        METHODS[method].complete(Recipe(method, {"a": 1.0}, {parameter: value}))


@pytest.mark.parametrize("factor", [float("inf"), float("-inf"), float("nan"), True, "1", 10**400])
@pytest.mark.parametrize("method", ["task_arithmetic", "lines+ties", "average"])
def test_scaling_factors_are_finite_numbers(method, factor):
    with pytest.raises(MethodError, match="scaling factor of 'a' = .* is not a (finite )?number"):
        METHODS[method].complete(Recipe(method, {"a": factor, "b": 1.0}))


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", {"density@movie": 2.0}, r"density@movie = 2 is outside 0 … 1"),
        ("ties", {"density@moovie": 0.5}, r"'moovie' takes no part. Did you mean 'movie'"),
        ("ties", {"lambda@movie": 0.5}, r"one lambda for all members and weights; per member may be density"),
        ("dare", {"drop@movie@layers:0-2": 0.5}, r"not between groups of their weights: write 'drop@movie'"),
        ("lines+della", {"seed@movie": 1}, r"one seed for all"),
        ("fisher", {"normalize@movie": True}, r"none may be per member"),
    ],
)
def test_parameters_of_single_members_are_checked(method, parameters, message):
    with pytest.raises(MethodError, match=message):
        METHODS[method].complete(Recipe(method, {"movie": 1.0}, parameters))


def test_parameters_of_single_members_survive_completion_under_a_modifier():
    result = METHODS["lines+della"].complete(Recipe("lines+della", {"movie": 1.0}, {"density@movie": 0.7}))
    assert result.parameters["density@movie"] == 0.7
    assert METHODS["lines+della"].complete(result) == result


@pytest.mark.parametrize("parameters", [{"density": "0" * 9999}, {"trim": "0" * 9999}])
def test_values_are_shown_in_brief(parameters):
    with pytest.raises(MethodError) as caught:
        METHODS["ties"].complete(Recipe("ties", {"a": 1.0}, parameters))
    assert len(str(caught.value)) < 300
