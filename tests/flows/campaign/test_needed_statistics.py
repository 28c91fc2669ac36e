import pytest
import torch
import yaml
from transformers import BertForTokenClassification

from flows.campaign.distil import job_of
from flows.campaign.needed_statistics import member_statistics, require_sources, solution_path
from flows.campaign.open_campaign import open_campaign
from flows.campaign.run import run
from flows.cli.merge import merge_recipe
from flows.config.campaign_file import load_campaign
from flows.config.sections import DistilSettings
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import SettingsError, StatisticsError
from merging.methods import METHODS
from merging.recipe import BASE, Recipe
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticsFile, measure, save
from merging.tasks import TextClassificationSettings, make_task

CURVED = {"gradient_matching": {"parameters": {"base_curvature": "fisher", "delta": 1e-8}}}


@pytest.fixture
def with_base_data(campaign_file, tiny_campaign, tiny_pool, save_member, tmp_path):
    """A campaign whose base `two` has a head of its own, with these settings of its data: `with_base_data(task="base")`."""
    paths = {name: str(save_member(tmp_path / name, tiny_pool["two"], seed, 3)) for seed, name in enumerate(("x", "y"))}

    def write(base=str(tiny_pool["two"]), **base_data):
        path = campaign_file(
            base=base,
            search={"candidates": 2, "methods": CURVED},
            selection={"mode": "all", "quality": "equal"},
            directory=str(tmp_path / "out"),
            base_data=base_data,
            resources={"evaluators": 1},
        )
        settings = yaml.safe_load(path.read_text())
        settings["members"] = paths
        settings["tasks"] = {
            "x": tiny_campaign["tasks"]["two"],
            "y": tiny_campaign["tasks"]["two"],
            "own": tiny_campaign["tasks"]["three"],
        }
        settings["task_heads"] = {"own": "x"}
        path.write_text(yaml.safe_dump(settings))
        return load_campaign(str(path))

    return write


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_base_s_fisher_is_computed_used_and_repeated(with_base_data, tiny_pool, tiny_campaign, tmp_path):
    campaign = with_base_data(task="own", examples=77)
    run(campaign, Display())
    (path,) = (tmp_path / "out" / "statistics").glob("base.fisher.*")
    file = StatisticsFile.open(str(path))
    file.check(Checkpoint.open(str(tiny_pool["two"])).fingerprint)
    task = make_task("own", TextClassificationSettings(**tiny_campaign["tasks"]["three"]), str(tiny_pool["two"]))
    statistic = STATISTICS["fisher"](LikelihoodSettings(examples=16))
    expected = statistic.finalize(measure(task, statistic))
    bound = 1e-6 * max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(file.read(name), value, rtol=1e-4, atol=bound)
    best = tmp_path / "out" / "exports" / "best"
    recipe = yaml.safe_load((best / "recipe.yaml").read_text())
    assert (recipe["base_statistics"], recipe["base_examples"]) == ([f"../../statistics/{path.name}"], 77)
    assert {member["examples"] for member in recipe["members"].values()} == {24}
    merge_recipe(str(best / "recipe.yaml"), str(tmp_path / "again"), None, 1.0, Display())
    assert Checkpoint.open(str(tmp_path / "again")).fingerprint == Checkpoint.open(str(best)).fingerprint


def test_the_base_s_fisher_without_its_data_is_refused(with_base_data, tiny_pool):
    with pytest.raises(
        SettingsError, match=r"needs the fisher of the base.*Set base_data.task .* or base_data.statistics"
    ):
        open_campaign(with_base_data(), Display())
    with pytest.raises(SettingsError, match="base_data.task: unknown task 'owm'. Did you mean 'own'"):
        with_base_data(task="owm")
    bare = open_campaign(with_base_data(base=str(tiny_pool["base"]), task="own"), Display())
    assert bare.examples()[BASE] == 24
    with pytest.raises(StatisticsError, match="the base has no head of its own for 'own'"):
        member_statistics(bare, bare.kinds, "nowhere", Display())


@pytest.mark.parametrize(("estimator", "fits"), [("exact", False), ("sampled", True), (None, True)])
def test_an_estimator_that_a_task_cannot_have_is_refused_before_anything_runs(
    campaign_file, tiny_pool, tokenizer, tmp_path, estimator, fits
):
    tagger = tmp_path / "tagger"
    BertForTokenClassification.from_pretrained(tiny_pool["base"]).save_pretrained(tagger)
    tokenizer.save_pretrained(tagger)
    (tmp_path / "tags.jsonl").write_text('{"words": ["good"], "tags": [1]}\n{"words": ["bad"], "tags": [0]}\n')
    path = campaign_file(
        search={"methods": ["fisher"]}, statistics={"fisher": {"estimator": estimator}}, heads=["pooler.*"]
    )
    settings = yaml.safe_load(path.read_text())
    settings["members"]["tags"] = str(tagger)
    data = dict.fromkeys(("train", "validation"), str(tmp_path / "tags.jsonl"))
    settings["tasks"]["tags"] = {"kind": "token_classification", "data": data}
    path.write_text(yaml.safe_dump(settings))
    opened = open_campaign(load_campaign(str(path)), Display())
    if fits:
        require_sources(opened)
        return
    with pytest.raises(StatisticsError, match=r"statistics.fisher.estimator: .* 'tags' \(token_classification\)"):
        require_sources(opened)


def _solution(campaign_file, statistics=None, distil=None, **changes):
    """The file of a solution of all members over the tiny pool, with changes of the campaign."""
    opened = open_campaign(load_campaign(str(campaign_file(directory="out", **changes))), Display())
    if distil is None:
        return solution_path(opened, "propagated", sorted(opened.pool.members), [], "c")
    return job_of(opened, statistics or {}, distil, DistilSettings(), "c")[0].path


def test_a_solution_goes_by_who_has_which_weights_and_by_what_is_merged(campaign_file, tiny_campaign):
    one, two, three = (tiny_campaign["members"][name] for name in ("one", "two", "three"))
    own = _solution(campaign_file)
    assert own == _solution(campaign_file)
    # of the same checkpoints under each other's names, with each other's examples
    assert own != _solution(campaign_file, members={"one": one, "two": three, "three": two})
    assert own != _solution(campaign_file, heads=["pooler.*"])


def test_a_distillation_goes_by_what_its_start_was_merged_from(campaign_file, tiny_campaign, tmp_path):
    plain = Recipe("task_arithmetic", dict.fromkeys(tiny_campaign["members"], 0.3))
    own = _solution(campaign_file, distil=plain)
    assert own == _solution(campaign_file, distil=plain)
    heads = {"one": "one", "two": "three", "three": "three"}
    assert own != _solution(campaign_file, distil=plain, task_heads=heads)  # another teacher of `two`
    fisher = METHODS["fisher"].default_recipe(list(tiny_campaign["members"]))
    places = set()
    for examples in (8, 12):
        files = {}
        for name in tiny_campaign["members"]:
            settings = TextClassificationSettings(**tiny_campaign["tasks"][name])
            task = make_task(name, settings, tiny_campaign["members"][name]["checkpoint"])
            statistic = STATISTICS["fisher"](LikelihoodSettings(examples=examples, estimator="exact"))
            checkpoint = Checkpoint.open(tiny_campaign["members"][name]["checkpoint"]).fingerprint
            path = str(tmp_path / f"{name}.{examples}.safetensors")
            save(path, statistic, measure(task, statistic), checkpoint=checkpoint, data=task.data_fingerprint("train"))
            files[name] = (path,)
        places.add(_solution(campaign_file, files, fisher))
    assert len(places) == 2
