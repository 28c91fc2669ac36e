import pytest
import torch
import yaml

from flows.campaign.export import in_words
from flows.config.recipe_file import RecipeFile, dump_recipe, load_recipe
from flows.config.yaml_file import validate
from merging.checkpoints.pool import Pool
from merging.errors import MethodError, SettingsError, StatisticsError
from merging.mergers.material import subset_fingerprint
from merging.methods import METHODS
from merging.methods.mergekit_names import MERGEKIT_NAMES
from merging.recipe import Recipe
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors


@pytest.fixture
def load(tmp_path):
    """Writes a recipe file of two members with these scaling factors, and loads it."""

    def run(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"base: base\nmembers: {{amazon: amazon, nyt: nyt}}\nmethod: task_arithmetic\n{text}\n")
        return load_recipe(str(path))

    return run


@pytest.mark.parametrize(
    ("text", "scaling"),
    [
        ("", {"amazon": 0.3, "nyt": 0.3}),
        ("scaling: 1", {"amazon": 1.0, "nyt": 1.0}),
        ("scaling: {nyt: 0.5}", {"amazon": 0.3, "nyt": 0.5}),
        (
            "scaling: {amazon: {layers:0-2: 0.5, '*': 1}, nyt: 0.3}",
            {"amazon@layers:0-2": 0.5, "amazon@*": 1.0, "nyt": 0.3},
        ),
        ("scaling: {amazon@layers:0-2: 0.5, 'amazon@*': 1.0}", {"amazon@layers:0-2": 0.5, "amazon@*": 1.0, "nyt": 0.3}),
    ],
)
def test_scaling_factors_of_members_and_of_their_groups(load, text, scaling):
    assert load(text).recipe().scaling == scaling


@pytest.mark.parametrize(
    ("text", "mistakes"),
    [
        ("scaling: x", ["scaling: Input should be a valid number, unable to parse string as a number (found 'x')"]),
        ("scaling: {nyt: .nan}", ["scaling.nyt: Input should be a finite number (found nan)"]),
        ("scaling: {nyt: {}}", ["scaling.nyt: expected at least one"]),
        (
            "scaling: {nyt: [1]}",
            ["scaling.nyt: Input should be a valid number, or expected `key: value` entries (found [1])"],
        ),
        (
            "scaling: {amazon: {'*': x}, nyt: y}",
            [
                "scaling.amazon.*: Input should be a valid number, unable to parse string as a number (found 'x')",
                "scaling.nyt: Input should be a valid number, unable to parse string as a number (found 'y')",
            ],
        ),
    ],
)
def test_a_value_of_several_kinds_is_one_mistake(load, text, mistakes):
    with pytest.raises(SettingsError) as error:
        load(text)
    assert str(error.value).split("\n  - ")[1:] == mistakes


@pytest.mark.parametrize(("text", "scaling"), [("", 0.5), ("scaling: {nyt: 0.5}", 0.5), ("scaling: 1", 1.0)])
def test_a_linear_merge_is_the_mean_where_nothing_is_said(load, text, scaling, tmp_path):
    path = tmp_path / "linear.yaml"
    path.write_text(f"base: base\nmembers: {{amazon: amazon, nyt: nyt}}\nmethod: linear\n{text}\n")
    assert load_recipe(str(path)).recipe().scaling == {"amazon": scaling, "nyt": scaling}


@pytest.fixture
def small(tiny_pool, tmp_path):
    """Writes statistics files of a member, or of members as a whole."""
    pool = Pool.open(str(tiny_pool["base"]), {"one": str(tiny_pool["one"])})

    def save(name, kind):
        tensors = {own: torch.rand(tuple(pool.weights[w].shape)) for w, own in pool.members["one"].names.items()}
        alone = kind == "fisher"
        checkpoint = pool.members["one"].checkpoint.fingerprint if alone else subset_fingerprint(pool, ["one"])
        if not alone:
            tensors = {w: tensors[own] for w, own in pool.members["one"].names.items()}
        path = str(tmp_path / name)
        save_tensors(path, kind, {}, tensors, Partial(counts={"examples": 1}), checkpoint=checkpoint, data="d")
        return path

    return save


def test_one_member_keeps_its_statistics_and_its_solution(small, tiny_pool, tmp_path):
    fisher, solution = small("fisher.safetensors", "fisher"), small("propagated.safetensors", "propagated")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {tiny_pool['base']}\nmembers:\n  one: {{checkpoint: {tiny_pool['one']}, statistics: [{fisher}]}}\n"
        f"statistics: [{solution}]\nmethod: fisher\n"
    )
    file = load_recipe(str(recipe))
    material = file.material()
    assert {kind: set(result) for kind, result in material.statistics.items()} == {
        "fisher": {"one"},
        "propagated": {"one"},
    }
    material.check(file.recipe())
    material.check(Recipe("regmean_propagated", {"one": 1.0}))


def test_a_second_file_of_one_kind_is_refused(small, tiny_pool, tmp_path):
    files = [small(f"{number}.safetensors", "fisher") for number in range(2)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {tiny_pool['base']}\nmembers:\n  one: {{checkpoint: {tiny_pool['one']}, statistics: [{', '.join(files)}]}}\n"
        "method: fisher\n"
    )
    with pytest.raises(
        StatisticsError, match=r"one has two files with the statistic 'fisher', .*0.safetensors and .*1"
    ):
        load_recipe(str(recipe)).material()


def test_groups_survive_a_round_trip(load, tmp_path):
    recipe = Recipe("ties", {"nyt@*": 0.2, "amazon": 0.3, "nyt@layers:0-2": 0.1}, {"density": 0.5})
    text = dump_recipe("base", {"amazon": ("amazon", ()), "nyt": ("nyt", ())}, recipe)
    assert yaml.safe_load(text)["scaling"] == {"amazon": 0.3, "nyt": {"*": 0.2, "layers:0-2": 0.1}}
    (tmp_path / "again.yaml").write_text(text)
    again = load_recipe(str(tmp_path / "again.yaml")).recipe()
    assert (again.scaling, again.parameters["density"]) == (recipe.scaling, 0.5)


@pytest.mark.parametrize("text", ["scaling: {amazn: 0.5}", "scaling: {amazn: {'*': 0.5}}", "scaling: {amazn@*: 0.5}"])
def test_strangers_are_named(load, text):
    with pytest.raises(MethodError, match=r"'amazn' is no member of this recipe. Did you mean 'amazon'\?"):
        load(text).recipe()


def test_no_member_is_called_base(tmp_path):
    """Statistics of the base are told from members' by that name."""
    (tmp_path / "recipe.yaml").write_text("base: base\nmembers: {base: amazon}\nmethod: average\n")
    with pytest.raises(SettingsError, match="members: no member may be called 'base'"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_the_card_tells_groups():
    assert in_words(0.5) == "0.5"
    assert in_words({"layers:0-2": 0.51234, "*": 1.0}) == "0.5123 (`layers:0-2`), 1 (`*`)"


@pytest.mark.parametrize(("text", "bound"), [("", 0.9), ("max_distance: null", None), ("max_distance: 2", 2.0)])
def test_the_largest_distance_survives_a_round_trip(load, text, bound, tmp_path):
    file = load(text)
    assert file.max_distance == bound
    members = {"nyt": ("nyt", ()), "amazon": ("amazon", ())}
    written = dump_recipe("base", members, file.recipe(), max_distance=file.max_distance)
    (tmp_path / "again.yaml").write_text(written)
    assert load_recipe(str(tmp_path / "again.yaml")).max_distance == bound


@pytest.mark.parametrize("name", MERGEKIT_NAMES)
def test_mergekit_s_names_are_methods_of_a_recipe_and_hints_elsewhere(name):
    method, implied = MERGEKIT_NAMES[name]
    value = {"base": "b", "members": {"a": "a"}, "method": name}
    recipe = validate(RecipeFile, value, "recipe")
    assert (recipe.method, recipe.parameters) == (method, dict(implied))
    recipe.recipe()
    for key in implied:
        with pytest.raises(SettingsError, match=f"'{name}' is '{method}' with {key}"):
            validate(RecipeFile, value | {"parameters": {key: "elected_mean"}}, "recipe")
    with pytest.raises(MethodError, match=f"unknown method '{name}'. It is mergekit's name of '{method}'"):
        METHODS[name]
