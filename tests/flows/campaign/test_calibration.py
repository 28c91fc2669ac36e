"""Members' own examples: what statistics and distillation come from, whatever judges."""

import pandas as pd
import pytest
import yaml

from flows.campaign.open_campaign import open_campaign
from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import SettingsError
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticsFile, measure
from merging.tasks import TextClassificationSettings, make_task

JUDGE = """
def right(model, checkpoint, split, limit):
    weight = next(model.parameters()).detach().flatten()
    return {"values": [float(weight[n]) for n in range(limit or 20)]}
"""


@pytest.fixture
def judged_elsewhere(campaign_file, tiny_campaign, tmp_path, monkeypatch):
    """A campaign that a function judges; each member brings texts without labels: `judged_elsewhere(**changes)`."""
    (tmp_path / "my_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        settings = yaml.safe_load(campaign_file(**changes).read_text())
        for name, member in settings["members"].items():
            train = tiny_campaign["tasks"][name]["data"]["train"]
            texts = tmp_path / f"{name}.parquet"
            pd.read_parquet(train)[["text"]].to_parquet(texts)
            member["calibration"] = {"data": {"train": texts.name}, "label": None, "max_length": 16}
            settings["tasks"][name] = {"kind": "custom", "evaluator": "my_judge:right"}
        settings["directory"] = str(tmp_path / "out")
        file = tmp_path / "judged.yaml"
        file.write_text(yaml.safe_dump(settings))
        return load_campaign(str(file))

    return write


def test_each_member_s_examples_are_a_source_beside_the_tasks(judged_elsewhere):
    campaign = judged_elsewhere()
    assert sorted(campaign.sources()) == ["one-calibration", "three-calibration", "two-calibration"]
    opened = open_campaign(campaign, Display())
    assert opened.examples() == {"one": 24, "two": 24, "three": 24}
    assert all(task.has_logits for task in opened.sources.values())
    assert not any(task.has_logits for task in opened.tasks.values())


def test_what_is_cut_of_calibration_data_is_said_and_missing_splits_are_not(judged_elsewhere, capsys):
    campaign = judged_elsewhere()
    members = {
        name: member.model_copy(update={"calibration": member.calibration.model_copy(update={"max_length": 100})})
        for name, member in campaign.members.items()
    }
    open_campaign(campaign.model_copy(update={"members": members}), Display())
    shown = capsys.readouterr().err
    assert "task 'two-calibration': texts are cut to 32 tokens" in shown
    assert "has no test split" not in shown


def test_a_task_of_members_without_calibration_stays_a_source(campaign_file, tiny_campaign):
    settings = yaml.safe_load(campaign_file().read_text())
    settings["members"]["one"]["calibration"] = {"data": {"train": tiny_campaign["tasks"]["one"]["data"]["train"]}}
    file = campaign_file()
    file.write_text(yaml.safe_dump(settings))
    assert sorted(load_campaign(str(file)).sources()) == ["one-calibration", "three", "two"]


@pytest.mark.parametrize(
    "calibration",
    [{"kind": "custom", "evaluator": "a:b"}, {"data": {"validation": "x.csv"}}],
)
def test_calibration_data_are_a_train_split_of_something_with_logits(campaign_file, calibration):
    settings = yaml.safe_load(campaign_file().read_text())
    settings["members"]["one"]["calibration"] = calibration
    file = campaign_file()
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingsError, match="`train` split of a kind of task that gives logits"):
        load_campaign(str(file))


def test_labels_are_asked_for_where_something_is_judged(campaign_file, tiny_campaign):
    task = {**tiny_campaign["tasks"]["one"], "label": None}
    with pytest.raises(SettingsError, match="nothing is judged without labels"):
        load_campaign(str(campaign_file(tasks={**tiny_campaign["tasks"], "one": task})))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_every_stage_works_on_them_under_a_judge_of_one_s_own(judged_elsewhere, tiny_pool, tmp_path):
    methods = {"regmean": {}, "fisher": {}, "regmean_propagated": {}}
    campaign = judged_elsewhere(
        search={"candidates": 4, "methods": methods},
        selection={"mode": "dpp-map", "quality": "equal"},
        distil={"steps": 3, "batch": 4},
        resources={"evaluators": 1},
    )
    run(campaign, Display())
    frame = pd.read_parquet(tmp_path / "out" / "ledger")
    assert (frame.status == "complete").all()
    assert {"regmean", "fisher", "regmean_propagated", "distilled"} <= set(frame.method)
    assert len(list((tmp_path / "out" / "statistics").glob("*.representation.*"))) == 9
    (path,) = (tmp_path / "out" / "statistics").glob("two.fisher.*")
    settings = TextClassificationSettings(data={"train": str(tmp_path / "two.parquet")}, label=None, max_length=16)
    task = make_task("two", settings, str(tiny_pool["two"]))
    statistic = STATISTICS["fisher"](LikelihoodSettings(examples=16))
    expected = statistic.finalize(measure(task, statistic, "train"))
    file = StatisticsFile.open(str(path))
    for name, value in expected.items():
        assert file.read(name).sub(value).abs().max() <= 1e-6 * value.abs().max() + 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_an_objective_that_divides_by_a_negative_score_ends_before_statistics(judged_elsewhere, tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(JUDGE.replace("float(weight[n])", "-1.0 - n"))
    campaign = judged_elsewhere(
        search={"candidates": 4, "methods": {"regmean": {}}, "objective": "normalized"},
        selection={"mode": "all"},
        resources={"evaluators": 1},
    )
    with pytest.raises(SettingsError, match="divides by the score of each task's own member.*use 'mean'"):
        run(campaign, Display())
    assert not list((tmp_path / "out").glob("statistics/*"))
    assert len(pd.read_parquet(tmp_path / "out" / "ledger")) == 4
