import pytest
import yaml

from flows.campaign.run import run_selection
from flows.cli.evaluate import evaluate
from flows.cli.merge import merge_recipe
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.checkpoints.pool import Pool
from merging.errors import MergequestError, SettingsError
from merging.evaluation.live_models import LiveModels, best_device
from merging.mergers.material import Material
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.tasks import make_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
SCALING = {"one": 0.25, "three": 0.5}


@pytest.fixture
def recipe_file(tiny_campaign, tmp_path):
    settings = {
        "base": tiny_campaign["base"],
        "members": {name: tiny_campaign["members"][name]["checkpoint"] for name in SCALING},
        "method": "task_arithmetic",
        "scaling": SCALING,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_recipes_checkpoints_members_and_the_base(campaign_file, recipe_file, tmp_path, capsys):
    merge_recipe(str(recipe_file), str(tmp_path / "merged"), None, 1.0, Display())
    campaign = load_campaign(str(campaign_file(resources={"evaluators": 1})))
    what = ["base", "two", str(recipe_file), str(tmp_path / "merged")]
    evaluate(campaign, what, "test", Display(), mismatch=True)
    scores, _, mismatches = capsys.readouterr().out.partition("gradient mismatch")
    rows = [line.split("│") for line in mismatches.splitlines() if line.count("│") == 6]
    norms = [[float(cell) for cell in row[2:6]] for row in rows if row[5].strip()]
    names = sorted(campaign.members)
    weighed = [SCALING.get(name, 0.0) * norm for name, norm in zip(names, norms[3], strict=False)]
    assert norms[2][:3] == pytest.approx(weighed, rel=0.02), "a recipe's own members and factors count"
    own = names.index("two")
    assert norms[1][own] < 1e-2 * min(norms[0]), "a member's own gradient is 0 at its own weights"
    lines = [line for line in scores.splitlines() if "±" in line]
    printed = [[float(cell.split("±")[0]) for cell in line.split("│")[2:5]] for line in lines]

    members = {name: member.checkpoint for name, member in campaign.members.items()}
    tasks = [make_task(name, settings, members[name]) for name, settings in campaign.tasks.items()]
    live = LiveModels(Material(Pool.open(campaign.base, members)), tasks, campaign.owners(), best_device())
    merged = Recipe("task_arithmetic", SCALING)
    for result, recipe in zip(printed, (base_recipe(), member_recipe("two"), merged, merged), strict=True):
        scores = live.measure(recipe, "test").scores
        assert result == [pytest.approx(scores[name].value, abs=1e-4) for name in campaign.tasks]


def test_unknown_words_and_splits_are_named(campaign_file):
    campaign = load_campaign(str(campaign_file()))
    with pytest.raises(SettingsError, match="'nobody' is no member"):
        evaluate(campaign, ["nobody"], "test", Display())
    with pytest.raises(SettingsError, match=r"unknown split 'tset'. Did you mean 'test'\?"):
        evaluate(campaign, ["one"], "tset", Display())


def test_a_recipe_without_its_statistics(campaign_file, recipe_file):
    settings = yaml.safe_load(recipe_file.read_text())
    recipe_file.write_text(yaml.safe_dump(settings | {"method": "regmean", "scaling": 1.0}))
    with pytest.raises(MergequestError, match="needs the statistic 'gram'"):
        evaluate(
            load_campaign(str(campaign_file(resources={"evaluators": 1}))), [str(recipe_file)], "validation", Display()
        )


def test_selection_alone_is_kept_and_reused(campaign_file, tmp_path):
    campaign = load_campaign(str(campaign_file(directory="out", selection={"sizes": [2]}, resources={"evaluators": 1})))
    first = run_selection(campaign, Display())
    assert [len(subset) for subset in first.subsets] == [2, 3]
    assert (tmp_path / "out" / "selection.json").exists()
    assert (tmp_path / "out" / "facts.json").exists()
    assert run_selection(campaign, Display()).as_dict() == first.as_dict()


def test_similarity_of_task_vectors_needs_no_data(campaign_file, tmp_path):
    settings = {"similarity": "task-vector", "sizes": [2]}
    selection = run_selection(load_campaign(str(campaign_file(directory="out", selection=settings))), Display())
    assert selection.similarity.shape == (3, 3)
    assert not (tmp_path / "out" / "statistics").exists()
