"""mergekit's methods and their defaults, as methods of ours."""

import pytest

from tests.flows.config.mergekit.configurations import convert, task_vectors

DENSITIES = ("density", "drop", "gamma", "epsilon")


@pytest.mark.parametrize(
    ("method", "extra", "expected"),
    [
        ("ties", "", ("ties", [0.5, 1.0], {"density": 0.25, "lambda": 1.0, "trim": "tensor", "disjoint": "mean"})),
        (
            "ties",
            "parameters: {normalize: false, lambda: 2, int8_mask: true}",
            ("ties", [0.5, 1.0], {"density": 0.25, "lambda": 2.0, "trim": "tensor", "disjoint": "sum"}),
        ),
        ("task_arithmetic", "", ("task_arithmetic", [0.5, 1.0], None)),
        ("task_arithmetic", "parameters: {lambda: 0.5}", ("task_arithmetic", [0.25, 0.5], None)),
        ("task_arithmetic", "parameters: {normalize: true}", ("task_arithmetic", [1 / 3, 2 / 3], None)),
        ("dare_linear", "", ("dare", [0.5, 1.0], {"drop": 0.75, "entries": "all", "rescale": "l1"})),
        (
            "dare_linear",
            "parameters: {rescale: false, lambda: 2}",
            ("dare", [1.0, 2.0], {"drop": 0.75, "entries": "all", "rescale": "none"}),
        ),
        ("dare_ties", "", ("dare", [0.5, 1.0], {"drop": 0.75, "entries": "elected", "rescale": "l1"})),
        (
            "dare_ties",
            "parameters: {normalize: true, lambda: 2}",
            ("dare", [0.5, 1.0], {"drop": 0.75, "entries": "elected_mean", "rescale": "l1", "lambda": 2.0}),
        ),
        ("breadcrumbs", "", ("breadcrumbs", [0.5, 1.0], {"density": 0.25, "gamma": 0.01, "entries": "all"})),
        ("breadcrumbs_ties", "", ("breadcrumbs", [0.5, 1.0], {"density": 0.25, "gamma": 0.01, "entries": "elected"})),
        (
            "breadcrumbs_ties",
            "parameters: {normalize: true, gamma: 0.1}",
            ("breadcrumbs", [0.5, 1.0], {"density": 0.25, "gamma": 0.1, "entries": "elected_mean"}),
        ),
        (
            "della_linear",
            "parameters: {normalize: true}",
            ("della", [1 / 3, 2 / 3], {"density": 0.25, "epsilon": 0.15, "entries": "all", "rescale": "l1"}),
        ),
        (
            "della",
            "parameters: {epsilon: 0.05}",
            ("della", [0.5, 1.0], {"density": 0.25, "epsilon": 0.05, "entries": "elected_mean", "rescale": "l1"}),
        ),
    ],
)
def test_methods_of_task_vectors(method, extra, expected):
    recipe = convert(task_vectors(method, extra)).recipe
    name, factors, parameters = expected
    assert recipe["method"] == name
    assert list(recipe["scaling"].values()) == pytest.approx(factors)
    assert recipe.get("parameters") == (None if parameters is None else pytest.approx(parameters))
    assert recipe["base"] == "b"
    assert recipe["members"] == {"one": "one", "two": "two"}


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("ties", "", {"density": 0.5, "density@two": 0.25}),
        ("dare_ties", "", {"drop": 0.5, "drop@two": 0.75}),
        ("breadcrumbs", ", gamma: 0.6", {"density": 0.5, "density@two": 0.25, "gamma": 0.5, "gamma@two": 0.6}),
        ("della", ", epsilon: 0.1", {"density": 0.5, "density@two": 0.25, "epsilon": 0.1}),
    ],
)
def test_thinning_may_be_a_member_s_own(method, more, expected):
    recipe = convert(task_vectors(method, more=more).replace("0.25", "0.5", 1)).recipe
    result = {key: value for key, value in recipe["parameters"].items() if key.partition("@")[0] in DENSITIES}
    assert result == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "count", "parameters", "name", "expected"),
    [
        ("sce", 2, "select_topk: 0.5, int8_mask: true", "sce", {"select": 0.5}),
        ("sce", 2, "", "sce", {"select": 1.0}),
        ("nearswap", 1, "t: 1e-3", "nearswap", {"t": 1e-3}),
        ("arcee_fusion", 1, "", "arcee_fusion", None),
        ("ram", 2, "", "ram", {"epsilon": 1e-5}),
        ("ramplus_tl", 2, "r: 0.2", "ram_plus", {"r": 0.2, "alpha": 0.2, "epsilon": 1e-5}),
        ("model_stock", 2, "filter_wise: true", "model_stock", {"over": "rows"}),
        ("nuslerp", 2, "weight: 1", "nuslerp", {"space": "task_vectors", "over": "tensor"}),
        (
            "nuslerp",
            2,
            "weight: 1, nuslerp_flatten: false",
            "nuslerp",
            {"space": "task_vectors", "over": "rows"},
        ),
        (
            "nuslerp",
            2,
            "weight: 1, nuslerp_flatten: false, nuslerp_row_wise: true",
            "nuslerp",
            {"space": "task_vectors", "over": "columns"},
        ),
        ("karcher", 2, "max_iter: 5", "karcher", None),
    ],
)
def test_methods_without_weights_or_with_their_own_parameters(method, count, parameters, name, expected):
    models = "".join(f"  - model: m{number}\n" for number in range(count))
    base = "" if method == "karcher" else "base_model: b\n"
    recipe = convert(f"merge_method: {method}\n{base}models:\n{models}parameters: {{{parameters}}}\n").recipe
    assert recipe["method"] == name
    assert recipe.get("parameters") == (None if expected is None else pytest.approx(expected))
    assert recipe["scaling"] == {f"m{number}": 1.0 for number in range(count)}


@pytest.mark.parametrize("method", ["dare_ties", "della", "breadcrumbs_ties", "ties"])
def test_a_density_of_one_thins_nothing_and_elects_signs(method):
    recipe = convert(task_vectors(method, "parameters: {normalize: true}", density=1)).recipe
    assert recipe["method"] == "ties"
    assert recipe["parameters"] == {"density": 1.0, "lambda": 1.0, "trim": "tensor", "disjoint": "mean"}


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "breadcrumbs"])
def test_a_density_of_one_is_task_arithmetic(method):
    assert convert(task_vectors(method, density=1.0)).recipe["method"] == "task_arithmetic"


def test_outliers_give_way_to_the_density_as_in_mergekit():
    recipe = convert(task_vectors("breadcrumbs", density=0.95, more=", gamma: 0.2")).recipe
    assert recipe["parameters"]["gamma"] == pytest.approx(0.05)


def test_linear_normalises_unless_told_and_its_base_is_a_member():
    text = "merge_method: linear\nmodels:\n  - {model: org/a, parameters: {weight: 1}}\n"
    text += "  - {model: x/a, parameters: {weight: '3e-1'}}\n"
    recipe = convert(text).recipe
    assert recipe == {
        "base": "org/a",
        "members": {"a": "org/a", "a-2": "x/a"},
        "method": "linear",
        "scaling": {"a": 1.0, "a-2": 0.3},
        "parameters": {"normalize": True},
    }
    assert convert(text + "parameters: {normalize: false}").recipe["parameters"] == {"normalize": False}
    assert convert(text + "base_model: x/a").recipe["base"] == "x/a"


def test_a_weight_for_all_models_stands_at_the_file_s_end():
    text = "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 2}}]\nparameters: {weight: 1}\n"
    assert convert(text).recipe["scaling"] == {"a": 1.0, "b": 2.0}


def test_slerp_goes_from_the_base_to_the_other():
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.25}\n"
    for given in (text, text.replace(", {model: b}", "")):  # mergekit adds the base
        recipe = convert(given).recipe
        assert recipe["scaling"] == {"a": 0.25, "b": 0.75}
        assert recipe["parameters"] == {"space": "weights"}


def test_model_stock_multislerp_and_a_base_among_the_models():
    models = "models: [{model: b}, {model: x}, {model: y}]\nbase_model: b\n"
    recipe = convert("merge_method: model_stock\n" + models).recipe
    assert (recipe["method"], recipe["scaling"]) == ("model_stock", {"x": 1.0, "y": 1.0})
    recipe = convert("merge_method: multislerp\nparameters: {weight: 0.5}\n" + models).recipe
    assert (recipe["method"], recipe["scaling"]) == ("multi_slerp", {"x": 0.5, "y": 0.5})


@pytest.mark.parametrize(("extra", "count"), [("", 1), ("parameters: {normalize: false}", 0)])
def test_a_mean_of_what_agrees_by_negative_weights_is_another_in_mergekit(extra, count):
    text = task_vectors("ties", extra).replace("weight: 1,", "weight: -1,")
    notes = convert(text).notes
    assert sum("divided by that of its weights' magnitudes" in note for note in notes) == count
    assert not convert(task_vectors("ties", extra)).notes
