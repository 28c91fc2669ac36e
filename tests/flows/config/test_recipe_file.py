import pytest
import yaml

from flows.campaign.export import in_words
from flows.config.recipe_file import dump_recipe, load_recipe
from merging.errors import MethodError, SettingsError
from merging.recipe import Recipe


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
