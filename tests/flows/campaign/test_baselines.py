"""Ensemble, all data and fine-tuning as rows beside the merges, on a real Ray."""

import copy

import pandas as pd
import pytest
import yaml

from flows.campaign.baselines import all_data_lessons
from flows.campaign.open_campaign import open_campaign
from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.report.scales import scales_of
from flows.report.table import as_markdown, results_table
from flows.report.test_answers import KeptPredictions
from merging.tasks import make_task
from search.ledger.ledger import Ledger
from search.objective import best


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_baselines_are_rows_that_never_win(tiny_campaign, tmp_path):
    settings = copy.deepcopy(tiny_campaign) | {
        "directory": "out",
        "selection": {"mode": "all"},
        "baselines": ["ensemble", "all_data", "fine_tuned"],
        "resources": {"evaluators": 1},
        "test": {"top": 1},
        "training": {"epochs": 2},
    }
    settings["tasks"]["far"] = settings["tasks"]["three"] | {"role": "unseen"}
    settings["task_heads"] = {"far": "two"}
    settings["search"] |= {"methods": ["average", "task_arithmetic"], "candidates": 3}
    (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings))
    campaign = load_campaign(str(tmp_path / "campaign.yaml"))
    run(campaign, Display())
    directory = Directory(str(tmp_path / "out"))
    rows = Ledger(directory.ledger, campaign.name).rows()
    result = {(row.method, row.split): row for row in rows if row.method in campaign.baselines}
    splits = {(name, split) for name in ("ensemble", "all_data") for split in ("validation", "test")}
    assert set(result) == splits | {("fine_tuned", "test")}
    assert all(row.status == "complete" and row.origin == "reference" for row in result.values())
    assert best(rows)[0].method in ("average", "task_arithmetic")
    winner = best(rows)[0]
    assert result["fine_tuned", "test"].parameters["start"] == winner.candidate
    scales = scales_of(campaign.tasks)
    lines = {line.label: line for line in results_table(rows, list(campaign.tasks), scales)}
    assert len(lines) == len(results_table(rows, list(campaign.tasks), scales))
    assert lines["trained on all data"].mean is not None
    assert lines["winner trained on the validation labels"].validation is None
    kept = KeptPredictions(directory.test_predictions).read(result["ensemble", "test"].candidate)
    assert {task: float(values.mean()) for task, values in kept.items()} == pytest.approx(
        result["ensemble", "test"].scores, rel=1e-6
    )
    assert all(
        row.objective == pytest.approx(sum(row.scores[t] for t in ("one", "two", "three")) / 3) for row in best(rows, 9)
    )
    assert all("far" in row.scores for row in rows if row.method != "all_data")  # it has a head each: none is far's
    for task in ("two", "three"):  # of the same classes, so one model
        own = make_task(task, campaign.tasks[task], str(tmp_path / "out" / "baselines" / "all_data" / "three"))
        assert own.evaluate(own.load_model(), "test").value == result["all_data", "test"].scores[task]
    text = run(campaign, Display())  # nothing is measured again
    assert "ensemble of all members" in text
    assert "unseen mean" in as_markdown(results_table(rows, list(campaign.tasks), scales))
    assert len(Ledger(directory.ledger, campaign.name).rows()) == len(rows)


def test_the_model_of_all_data_has_every_class_of_its_members_heads(tiny_campaign, tmp_path):
    settings = copy.deepcopy(tiny_campaign)
    whole = pd.read_parquet(settings["tasks"]["three"]["data"]["train"])
    few = tmp_path / "train.parquet"
    whole[whole["label"] < 2].to_parquet(few)  # its head has three
    settings["tasks"]["three"]["data"]["train"] = str(few)
    (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings))
    opened = open_campaign(load_campaign(str(tmp_path / "campaign.yaml")), Display())
    lessons = all_data_lessons(opened)
    assert {name: len(made.labels) for name, made in lessons.items()} == {"one": 2, "two": 3, "three": 3}
    assert lessons["two"].labels == lessons["three"].labels, "one head for both"
