import optuna
import pytest

from merging.errors import MethodError, SettingsError
from merging.methods.method import METHODS
from merging.recipe import Recipe
from search.space.method_space import MethodSpace, weight_groups
from search.space.ranges import Domain
from search.space.search_space import Space

MEMBERS = ("nyt", "amazon", "movie")
SUBSETS = (("amazon", "movie", "nyt"), ("nyt", "amazon"), ("movie",))
ALL = {name: MethodSpace() for name in ("average", "task_arithmetic", "ties", "regmean", "toy_curve", "toy_free")}


def proposals(space, count=60):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(count):
        trial = study.ask()
        yield trial, space.suggest(trial)


@pytest.mark.parametrize(
    ("scaling", "groups"),
    [
        ("shared", ()),
        ("per_member", ()),
        ("per_depth", ("layers:0-2", "layers:3-")),
        ("per_pattern", ("*attention*", "*")),
    ],
)
@pytest.mark.parametrize("subsets", [None, SUBSETS])
def test_params_and_distributions_are_the_inverse_of_suggest(scaling, groups, subsets):
    space = Space(ALL, MEMBERS, subsets, scaling, groups)
    seen = set()
    for trial, recipe in proposals(space):
        assert space.params(recipe) == trial.params
        assert space.distributions(recipe) == trial.distributions
        assert list(space.distributions(recipe)) == list(trial.distributions)
        assert recipe in space
        assert space.suggest(optuna.trial.FixedTrial(trial.params)).identity == recipe.identity
        assert METHODS[recipe.method].complete(recipe) == recipe
        seen.add((recipe.method, recipe.members))
    assert len(seen) >= 4


def test_names_and_conditions():
    space = Space({"toy_curve": MethodSpace(), "toy_free": MethodSpace()}, MEMBERS, SUBSETS, "per_member")
    curve = METHODS["toy_curve"].default_recipe(["amazon", "nyt"])
    below = ("rho", "floor", "steps", "mode", "norm", "scaling.amazon", "scaling.nyt")
    assert list(space.params(curve)) == ["method", "members", *(f"toy_curve.{name}" for name in below)]
    assert space.params(curve)["members"] == "amazon+nyt"
    # one member's relative weight cancels
    assert list(space.params(METHODS["toy_free"].default_recipe(["movie"]))) == ["method", "members"]
    assert "toy_free.scaling.nyt" in space.params(METHODS["toy_free"].default_recipe(["amazon", "nyt"]))


def test_a_shared_factor_is_one_parameter_unless_it_cancels():
    space = Space({"toy_curve": MethodSpace(), "toy_free": MethodSpace()}, MEMBERS, None, "shared")
    (trial, recipe), *_ = proposals(space)
    assert recipe.method == "toy_curve"  # toy_free has one recipe only, which is an baseline
    assert "toy_curve.scaling" in trial.params
    assert len(set(recipe.scaling.values())) == 1
    assert METHODS["toy_free"].default_recipe(MEMBERS) not in space
    assert METHODS["toy_free"].default_recipe(MEMBERS) in space.baselines()


def test_what_is_not_searched_keeps_its_default():
    for trial, recipe in proposals(Space({"toy_curve": MethodSpace()}, MEMBERS), 5):
        assert recipe.parameters["quiet"] == 7.0
        assert "toy_curve.quiet" not in trial.params
        assert "method" not in trial.params
        assert isinstance(recipe.parameters["steps"], int)


def test_overrides():
    given = MethodSpace.model_validate(
        {
            "scaling": [0.2, 0.4],
            "parameters": {
                "rho": 0.5,
                "quiet": {"low": 1, "high": 2},
                "mode": ["signed"],
                "steps": {"low": 2, "high": 3},
            },
        }
    )
    space = Space({"toy_curve": given}, MEMBERS)
    for trial, recipe in proposals(space, 20):
        assert set(recipe.scaling.values()) <= {0.2, 0.4}
        assert recipe.parameters["rho"] == 0.5
        assert recipe.parameters["mode"] == "signed"
        assert 1 <= recipe.parameters["quiet"] <= 2
        assert recipe.parameters["steps"] in (2, 3)
        assert not {"toy_curve.rho", "toy_curve.mode"} & set(trial.params)
        assert space.params(recipe) == trial.params
    baseline = space.baselines()[-1]
    assert baseline in space
    assert baseline.parameters["quiet"] == 2.0
    assert baseline.parameters["steps"] == 3
    assert set(baseline.scaling.values()) == {0.2}


def test_what_lies_outside_is_told():
    space = Space({"toy_curve": MethodSpace(scaling=Domain(low=0.1, high=0.5))}, MEMBERS, None, "shared")
    inside = METHODS["toy_curve"].default_recipe(MEMBERS)
    outside = [
        Recipe("toy_curve", dict.fromkeys(MEMBERS, 0.9), inside.parameters),
        Recipe("toy_curve", {"nyt": 0.3, "amazon": 0.4, "movie": 0.3}, inside.parameters),
        Recipe("toy_curve", inside.scaling, {**inside.parameters, "quiet": 8.0}),
        Recipe("toy_curve", {"nyt": 0.3}, inside.parameters),
        METHODS["task_arithmetic"].default_recipe(MEMBERS),
    ]
    assert inside in space
    for recipe in outside:
        assert recipe not in space
        with pytest.raises(SettingsError, match="search space"):
            space.params(recipe)
    assert Recipe("toy_curve", inside.scaling, {"rhoo": 1.0}) not in space


def test_the_baselines():
    space = Space(ALL, MEMBERS, SUBSETS, "per_member")
    baselines = space.baselines()
    assert baselines[0] == METHODS["average"].default_recipe(sorted(MEMBERS))
    assert len({recipe.identity for recipe in baselines}) == len(baselines) == len(ALL)
    assert all(METHODS[name].default_recipe(sorted(MEMBERS)) in baselines for name in ALL)
    assert all(recipe in space for recipe in baselines)


def test_starts_and_methods_that_know_most_of_the_members_come_first():
    methods = ("task_arithmetic", "ties", "regmean", "regmean_propagated")
    start = Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 0.7))
    space = Space({name: MethodSpace() for name in methods}, MEMBERS, None, "per_member", (), [start])
    average, first, *others = space.baselines()
    assert (average.method, first) == ("average", start)
    assert [recipe.method for recipe in others] == ["regmean_propagated", "regmean", "task_arithmetic", "ties"]


def test_the_plain_average_of_all_is_an_anchor_even_outside_the_space():
    space = Space({"toy_curve": MethodSpace()}, MEMBERS, [("amazon", "nyt")])
    assert [(recipe.method, len(recipe.members), recipe in space) for recipe in space.baselines()] == [
        ("average", 3, False),
        ("toy_curve", 3, False),
    ]


def test_a_method_for_two_is_only_asked_for_two():
    methods = {"slerp": MethodSpace(), "toy_curve": MethodSpace()}
    space = Space(methods, MEMBERS, [MEMBERS, MEMBERS[:2], MEMBERS[1:]], "shared")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    sizes = {"slerp": set(), "toy_curve": set()}
    for _ in range(60):
        trial = study.ask()
        recipe = space.suggest(trial)
        assert space.params(recipe) == trial.params
        sizes[recipe.method].add(len(recipe.members))
    assert sizes == {"slerp": {2}, "toy_curve": {2, 3}}
    assert [len(recipe.members) for recipe in space.baselines()] == [3, 2, 3]
    with pytest.raises(SettingsError, match="'slerp' takes 2 members at most"):
        Space(methods, MEMBERS)


def test_nothing_to_vary():
    space = Space({"toy_free": MethodSpace()}, MEMBERS)
    assert not space.searchable
    assert len(space.baselines()) == 2
    with pytest.raises(SettingsError, match="nothing to vary"):
        next(proposals(space))


@pytest.mark.parametrize(
    ("methods", "members", "subsets", "error", "message"),
    [
        ({"tiez": MethodSpace()}, MEMBERS, None, MethodError, "Did you mean 'ties'"),
        ({}, MEMBERS, None, SettingsError, "at least one"),
        ({"ties": MethodSpace()}, (), None, SettingsError, "at least one"),
        (
            {"ties": MethodSpace(parameters={"densty": Domain(value=1)})},
            MEMBERS,
            None,
            SettingsError,
            "'density'",
        ),
        (
            {"average": MethodSpace(parameters={"rho": Domain(value=1)})},
            MEMBERS,
            None,
            SettingsError,
            "It has none",
        ),
        (
            {"ties": MethodSpace(parameters={"density": Domain(low=0.5, high=2)})},
            MEMBERS,
            None,
            SettingsError,
            "outside",
        ),
        (
            {"ties": MethodSpace(parameters={"density": Domain(value="x")})},
            MEMBERS,
            None,
            SettingsError,
            "not a number",
        ),
        (
            {"toy_curve": MethodSpace(parameters={"mode": Domain(value="x")})},
            MEMBERS,
            None,
            SettingsError,
            "not one of",
        ),
        (
            {"toy_curve": MethodSpace(parameters={"mode": Domain(low=0, high=1)})},
            MEMBERS,
            None,
            SettingsError,
            "mode",
        ),
        ({"ties": MethodSpace()}, MEMBERS, [("nyt", "amazn")], SettingsError, "Did you mean 'amazon'"),
        ({"ties": MethodSpace()}, MEMBERS, [("nyt", "movie"), ("movie", "nyt")], SettingsError, "twice"),
        ({"ties": MethodSpace()}, MEMBERS, [()], SettingsError, "empty"),
        ({"ties": MethodSpace(scaling_of={"nyt": Domain(value=1)})}, MEMBERS, None, SettingsError, "share one factor"),
    ],
)
def test_mistakes_are_named(methods, members, subsets, error, message):
    with pytest.raises(error, match=message):
        Space(methods, members, subsets)


WEIGHTS = ["embeddings.weight", *(f"layer.{number}.attention.weight" for number in range(6)), "pooler.weight"]


@pytest.mark.parametrize(
    ("scaling", "groups"),
    [
        ("shared", ()),
        ("per_member", ()),
        ("per_depth", ("layers:0-1", "layers:2-3", "layers:4-")),
        ("per_layer", ("layers:0", "layers:1", "layers:2", "layers:3", "layers:4", "layers:5-")),
        ("per_pattern", ("*attention*", "*")),
    ],
)
def test_what_has_a_factor_of_its_own(scaling, groups):
    assert weight_groups(scaling, WEIGHTS, 3, ("*attention*",)) == groups


def test_every_member_has_a_factor_in_every_group():
    space = Space({"toy_curve": MethodSpace()}, MEMBERS, None, "per_depth", ("layers:0-2", "layers:3-"))
    (trial, recipe), *_ = proposals(space)
    keys = [f"{member}@{group}" for member in sorted(MEMBERS) for group in ("layers:0-2", "layers:3-")]
    assert sorted(recipe.scaling) == keys
    assert [name for name in trial.params if ".scaling" in name] == [f"toy_curve.scaling.{key}" for key in keys]
    assert recipe.members == tuple(sorted(MEMBERS))


def test_anchors_in_groups_are_plain_recipes_that_the_sampler_hears_of():
    space = Space(ALL, MEMBERS, SUBSETS, "per_depth", ("layers:0-2", "layers:3-"))
    plain = Space(ALL, MEMBERS, SUBSETS, "per_member")
    assert space.baselines() == plain.baselines()
    assert all(recipe in space for recipe in space.baselines())
    params = space.params(METHODS["ties"].default_recipe(MEMBERS))
    assert params["ties.scaling.amazon@layers:3-"] == METHODS["ties"].scaling.default


def test_a_method_without_factors_has_no_groups():
    methods = {"regmean_propagated": MethodSpace(), "toy_curve": MethodSpace(scaling=Domain(value=0.5))}
    for trial, recipe in proposals(Space(methods, MEMBERS, None, "per_layer", ("layers:0", "layers:1-")), 20):
        assert set(recipe.scaling) == set(MEMBERS)
        assert not any("scaling" in name for name in trial.params)


def test_ranges_of_single_members_and_groups():
    given = MethodSpace.model_validate(
        {"scaling": 0.3, "scaling_of": {"nyt": {"low": 0.5, "high": 0.6}, "nyt@layers:3-": [0.9, 1.0], "amazon": 0.1}}
    )
    space = Space({"toy_curve": given}, MEMBERS, None, "per_depth", ("layers:0-2", "layers:3-"))
    for trial, recipe in proposals(space, 10):
        assert (recipe.scaling["movie"], recipe.scaling["amazon"]) == (0.3, 0.1)
        assert 0.5 <= recipe.scaling["nyt@layers:0-2"] <= 0.6
        assert recipe.scaling["nyt@layers:3-"] in (0.9, 1.0)
        assert space.params(recipe) == trial.params
    assert space.baselines()[-1] in space


def test_recipes_of_other_groups_are_not_in_the_space():
    space = Space({"toy_curve": MethodSpace()}, MEMBERS, None, "per_depth", ("layers:0-2", "layers:3-"))
    inside = METHODS["toy_curve"].default_recipe(MEMBERS)
    others = {"amazon@layers:0-3": 0.1, "amazon@layers:4-": 0.2, "nyt": 0.3, "movie": 0.3}
    assert inside in space
    assert Recipe("toy_curve", others, inside.parameters) not in space
    assert Recipe("toy_curve", others, inside.parameters) not in Space(
        {"toy_curve": MethodSpace()}, MEMBERS, None, "per_member"
    )


@pytest.mark.parametrize("scaling", ["shared", "per_member"])
def test_a_linear_search_starts_at_the_mean(scaling):
    (recipe,) = (
        r for r in Space({"linear": MethodSpace()}, MEMBERS, None, scaling).baselines() if r.method == "linear"
    )
    assert recipe.scaling == pytest.approx(dict.fromkeys(MEMBERS, 1 / len(MEMBERS)))
