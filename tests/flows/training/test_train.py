import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from flows.cli.app import app
from flows.config.campaign_file import Campaign, PoolMember, load_campaign
from flows.config.train_file import load_train_file
from flows.directory.progress import Display
from flows.training.train import Course, lesson, train_missing
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import SettingsError
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks import TextClassificationSettings


def train(*words: object) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, words), "--quiet"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def file(tiny_pool, write_texts, tmp_path) -> Path:
    for task, seed in (("alpha", 0), ("beta", 1)):
        for split in ("train", "validation", "test"):
            write_texts(tmp_path / f"{task}.{split}.parquet", 24, seed=seed)
    tasks = {
        task: {
            "data": {split: f"{task}.{split}.parquet" for split in ("train", "validation", "test")},
            "max_length": 16,
        }
        for task in ("alpha", "beta")
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"base": str(tiny_pool["base"]), "tasks": tasks, "out": "members"}))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_members_of_a_train_file_become_a_campaign(file, tmp_path):
    settings = yaml.safe_load(file.read_text())
    settings |= {"shared_head": True, "partition": {"task": "beta", "parts": 2}, "together": "all"}
    file.write_text(yaml.safe_dump(settings))
    places = train(file).split()
    names = ["alpha", "beta-1", "beta-2", "all", "campaign.yaml"]
    assert places == [str(tmp_path / "members" / name) for name in names]
    before = {name: (tmp_path / "members" / name / "model.safetensors").stat().st_mtime_ns for name in names[:-1]}
    campaign = load_campaign(places[-1])
    assert (list(campaign.members), list(campaign.tasks)) == (["alpha", "beta-1", "beta-2"], ["alpha", "beta"])
    assert [campaign.source_of(name) for name in campaign.members] == [
        "alpha",
        "beta-1-calibration",
        "beta-2-calibration",
    ]
    pool = Pool.open(campaign.base, {name: member.checkpoint for name, member in campaign.members.items()})
    assert "classifier.weight" in pool.weights
    assert not any(member.head for member in pool.members.values())
    train(file)  # nothing is trained again
    assert before == {
        name: (tmp_path / "members" / name / "model.safetensors").stat().st_mtime_ns for name in names[:-1]
    }
    # members that got lost, a part's among them, are trained from the campaign file as they were, and no other is touched
    lost = {name: campaign.members[name].checkpoint for name in ("alpha", "beta-2")}
    before = {name: Checkpoint.open(place).fingerprint for name, place in lost.items()}
    for place in lost.values():
        shutil.rmtree(place)
    train(places[-1], "--epochs", 1)
    assert {name: Checkpoint.open(place).fingerprint for name, place in lost.items()} == before
    assert train(places[-1], "--epochs", 2) == ""


def test_labels_are_those_of_the_base_where_its_head_has_them(tiny_pool, tmp_path):
    for name, labels in (
        ("numbers", [0, 1, 2]),
        ("names", ["LABEL_0", "LABEL_2", "LABEL_0"]),
        ("others", ["x", "y", "x"]),
    ):
        pd.DataFrame({"text": ["a", "b", "c"], "label": labels}).to_parquet(tmp_path / f"{name}.parquet")
    actual = {
        name: lesson(
            str(tiny_pool["three"]), TextClassificationSettings(data={"train": str(tmp_path / f"{name}.parquet")})
        ).labels
        for name in ("numbers", "names", "others")
    }
    assert actual == {"numbers": (), "names": (), "others": ["x", "y"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"gamma": ["x", "y"]}}, "labels: unknown task 'gamma'"),
        ({"own_head": ["alpha"], "shared_head": True}, "shared_head"),
        ({"partition": {"task": "gamma", "parts": 2}}, "partition.task"),
        ({"together": "alpha"}, "'alpha' is taken"),
        ({"training": {"epochs": 0}}, "training.epochs"),
        ({"tasks": {"t": {"kind": "custom", "evaluator": "m:f"}}}, "gives logits"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(file, changes, message):
    with pytest.raises(SettingsError, match=message):
        load_train_file({**yaml.safe_load(file.read_text()), **changes}, str(file))


def test_two_missing_members_of_one_task_would_be_the_same(file, tiny_pool, tmp_path):
    settings = yaml.safe_load(file.read_text())
    members = {name: {"checkpoint": f"members/{name}", "task": "alpha"} for name in ("first", "second")}
    campaign = tmp_path / "twins.yaml"
    campaign.write_text(
        yaml.safe_dump(
            {
                "name": "twins",
                "base": settings["base"],
                "members": members,
                "tasks": {"alpha": settings["tasks"]["alpha"]},
            }
        )
    )
    result = CliRunner().invoke(app, ["train", str(campaign), "--quiet"])
    assert result.exit_code == 2
    assert "members.second: it would be trained on the data of 'first', to the same weights" in result.output
    assert not (tmp_path / "members").exists()


@pytest.mark.parametrize("also", ["there", "missing"])
def test_a_missing_part_is_trained_on_its_own_examples(file, monkeypatch, also):
    campaign = parts_campaign(file, {"first": "alpha.test.parquet", "second": "alpha.train.parquet"})
    if also == "there":
        campaign = campaign.model_copy(
            update={"members": campaign.members | {"second": PoolMember(checkpoint=campaign.base, task="alpha")}}
        )
    made = courses_of(campaign, monkeypatch)
    assert {name: next(iter(course.lessons.values())).files for name, course in made.items()} == {
        name: [str(file.parent / data)]
        for name, data in (("first", "alpha.test.parquet"), ("second", "alpha.train.parquet"))
        if also == "missing" or name == "first"
    }


def test_examples_for_statistics_are_not_trained_on(file, monkeypatch):
    campaign = parts_campaign(file, {"first": "alpha.test.parquet"})
    with pytest.raises(SettingsError, match=r"members\.first: .*all examples of 'alpha' or on its calibration data"):
        courses_of(campaign, monkeypatch)
    unlabelled = parts_campaign(file, {"first": "alpha.test.parquet"}, label=None)
    (lesson_of_first,) = courses_of(unlabelled, monkeypatch)["first"].lessons.values()
    assert lesson_of_first.files == [str(file.parent / "alpha.train.parquet")]


def parts_campaign(file: Path, data_of: Mapping[str, str], **calibration: Any) -> Campaign:
    """A campaign of members of one task, with examples of their own, whose checkpoints are not there."""
    settings = yaml.safe_load(file.read_text())
    members = {
        name: {
            "checkpoint": str(file.parent / "members" / name),
            "task": "alpha",
            "calibration": {"kind": "text_classification", "data": {"train": data}, "max_length": 16, **calibration},
        }
        for name, data in data_of.items()
    }
    path = file.parent / "parts.yaml"
    tasks = {"alpha": settings["tasks"]["alpha"]}
    path.write_text(yaml.safe_dump({"name": "parts", "base": settings["base"], "members": members, "tasks": tasks}))
    return load_campaign(str(path))


def courses_of(campaign: Campaign, monkeypatch) -> dict[str, Course]:
    """What would be trained."""
    made: dict[str, Course] = {}
    monkeypatch.setattr("flows.training.train.run_courses", lambda courses, *_: made.update(courses) or {})
    train_missing(campaign, TrainingSettings(), None, Display(Console(quiet=True)))
    return made
