import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from merging.errors import SettingsError
from search.samplers.make_sampler import SAMPLERS, ask_seed, make_sampler, memories
from search.space.ranges import Domain
from search.space.search_space import MethodSpace, Space
from search.subsets.choose_subsets import select

GRID = {"task_arithmetic.scaling.a": [0.1, 0.3, 0.5, 0.7], "task_arithmetic.scaling.b": [0.1, 0.2, 0.3]}
STEPPED = MethodSpace(scaling=Domain(low=0.1, high=0.7, step=0.1))
ARGUMENTS = {"cmaes": {"popsize": 4}, "nsga2": {"population_size": 4}, "nsga3": {"population_size": 4}}
ARGUMENTS |= {"gp": {"n_startup_trials": 6}, "grid": {"search_space": GRID}, "qmc": {"scramble": True}}


def run(name, count, seed=3, one_for_all=False):
    """Parameters that a sampler proposes for a toy with its optimum at a = 0.5, b = 0.2."""
    space = Space({"task_arithmetic": STEPPED if name == "brute_force" else MethodSpace()}, "ab", None, "per_member")
    study = optuna.create_study(direction="maximize")
    study.sampler = make_sampler(name, seed, ARGUMENTS.get(name), 0)
    for number in range(count):
        if not one_for_all:
            study.sampler = make_sampler(name, seed, ARGUMENTS.get(name), number)
        trial = study.ask()
        scaling = space.suggest(trial).scaling
        study.sampler = optuna.samplers.RandomSampler(0)
        study.tell(trial, -((scaling["a"] - 0.5) ** 2) - (scaling["b"] - 0.2) ** 2)
    return [trial.params for trial in study.trials], study


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "quality_diversity"])
def test_every_sampler_proposes_ten_and_the_same_ten_again(name):
    first, _ = run(name, 10)
    again, _ = run(name, 10)
    assert first == again
    assert len({tuple(params.items()) for params in first}) > 5


@pytest.mark.parametrize("name", ["tpe", "random", "cmaes", "nsga2", "nsga3"])
def test_another_seed_proposes_others(name):
    assert run(name, 6, seed=3)[0] != run(name, 6, seed=4)[0]


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_what_is_learnt_survives_a_sampler_of_its_own_for_each_trial(name):
    _, study = run(name, 30)
    early = sum(trial.value for trial in study.trials[:8]) / 8
    late = sum(trial.value for trial in study.trials[-8:]) / 8
    assert late > early / 3  # values are negative distances: less than a third of the early one


def test_a_grid_is_covered_once():
    params, _ = run("grid", 12)
    assert len({tuple(sorted(entry.items())) for entry in params}) == 12


def test_quasi_random_points_do_not_repeat_and_fill_the_square():
    params, _ = run("qmc", 17)
    cells = {tuple(int(value / 1.5 * 4) for value in entry.values()) for entry in params[1:]}
    assert len(cells) >= 13


def test_quasi_random_points_in_a_conditional_space():
    space = Space({"task_arithmetic": MethodSpace(), "ties": MethodSpace()}, "ab", None, "shared")
    study = optuna.create_study(direction="maximize")
    seen = []
    for number in range(40):
        study.sampler = make_sampler("qmc", 1, None, number)
        trial = study.ask()
        seen.append(space.suggest(trial))
        study.tell(trial, 0.0)
    factors = [recipe.scaling["a"] for recipe in seen if recipe.method == "task_arithmetic"]
    assert 15 <= len(factors) <= 25
    assert len(set(factors)) == len(factors)


@pytest.mark.parametrize("inner", ["tpe", "nsga2"])
def test_subsets_from_a_selection_and_the_rest_from_another_sampler(inner):
    S = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    selection = select("abc", "every", quality=dict.fromkeys("abc", 1.0), similarity=S, sizes=[2])
    space = Space({"task_arithmetic": MethodSpace(), "ties": MethodSpace()}, "abc", selection.subsets, "per_member")

    def proposals():
        study = optuna.create_study(direction="maximize")
        for number in range(40):
            arguments = {"sampler": inner, "learn_sizes": False, "strength": 0.0}
            study.sampler = make_sampler("quality_diversity", 3, arguments, number, selection)
            trial = study.ask()
            recipe = space.suggest(trial)
            study.sampler = optuna.samplers.RandomSampler(0)
            study.tell(trial, recipe.scaling["c"] if "c" in recipe.members else 0.0)
        return [trial.params for trial in study.trials]

    first = proposals()
    assert first == proposals()
    drawn = [params["members"] for params in first]
    assert drawn.count("a+b") <= 2  # a and b are alike
    assert 10 <= drawn.count("a+b+c") <= 30
    assert {params["method"] for params in first} == {"task_arithmetic", "ties"}


def test_seeds_differ_by_trial():
    assert (
        len({ask_seed(0, number) for number in range(1000)} | {ask_seed(1, number) for number in range(1000)}) == 2000
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpee", {}, "Did you mean 'tpe'"),
        ("tpe", {"n_startup": 3}, "Did you mean 'n_startup_trials'"),
        ("tpe", {"gamma": "x"}, "no argument 'gamma'"),
        ("random", {"seed": 1}, "It takes none"),
        ("nsga2", {"population_size": 1}, "population_size"),
        ("grid", {}, "search_space"),
        ("grid", {"search_space": 3}, "refuses"),
        ("quality_diversity", {"strength": -1}, "strength"),
        ("quality_diversity", {"similarity": 1}, "no argument 'similarity'"),
        ("quality_diversity", {"sampler": "quality_diversity"}, "not itself"),
        ("quality_diversity", {"sampler": "tpe", "sampler_arguments": {"n_startup": 3}}, "n_startup_trials"),
    ],
)
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(SettingsError, match=message):
        make_sampler(name, 0, arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "known"),
    [
        ("tpe", {}, 100),
        ("gp", {"n_startup_trials": 200}, 400),  # or it would never know of 200, and start at random for ever
        ("cmaes", {"popsize": 400}, 800),
        ("cmaes", {"n_startup_trials": 900}, 900),
        ("nsga2", {"population_size": 250}, 500),
        ("qmc", {}, 1),
        ("random", {}, None),
        ("quality_diversity", {"sampler": "nsga3"}, 200),
    ],
)
def test_a_history_is_as_long_as_the_sampler_needs(name, arguments, known):
    result = memories(name, arguments, 100)
    if known is None:
        assert result is None
        return
    entry = optuna.distributions.FloatDistribution(0, 1)
    size = arguments.get("popsize") or arguments.get("population_size") or 100
    numbers = set()
    for number in range(1000):
        trial = create_trial(value=-float(number), params={"x": 0.5}, distributions={"x": entry})
        trial.number = number
        if name != "cmaes" or "popsize" in arguments:
            trial.system_attrs = {"cma:generation": number // size, "bred": [number // size, []]}
        for memory in result:
            memory.add(trial)
    numbers = {trial.number for memory in result for trial in memory.trials()}
    assert known * 0.75 <= len(numbers) <= known * 1.5


def test_evolution_gets_on_where_most_candidates_are_pruned():
    study = optuna.create_study(direction="maximize")
    for number in range(16):
        study.sampler = make_sampler("cmaes", 3, {"popsize": 4}, number)
        trial = study.ask()
        value = -(trial.suggest_float("x", 0, 1) ** 2) - trial.suggest_float("y", 0, 1) ** 2
        study.sampler = optuna.samplers.RandomSampler(0)
        trial.report(value, 10)
        study.tell(trial, state=TrialState.PRUNED if number else TrialState.COMPLETE, values=None if number else value)
    assert study.trials[-1].system_attrs["cma:generation"] >= 2
