"""A stage that has nothing to work on is refused by `check`, and a run stops there too."""

import re

import pytest
import yaml

from flows.campaign.open_campaign import open_campaign
from flows.campaign.run import check
from flows.campaign.stages import distillation
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import SettingsError
from ray_tasks.jobs.distillation import sources_to_distil

EVALUATOR = "def score(model, checkpoint, split, limit):\n    return -3.0\n"
CUSTOM = {"kind": "custom", "evaluator": "a_judge:score", "model_class": "AutoModelForSequenceClassification"}
PLAIN = {"methods": ["average", "task_arithmetic"]}


def test_a_task_of_no_member_s_without_train_examples_is_left_out_of_the_distillation(campaign_file, tiny_campaign):
    given = tiny_campaign["tasks"]["two"]
    other = {**given, "data": {"validation": given["data"]["validation"]}}
    path = campaign_file(
        tasks={**tiny_campaign["tasks"], "other": other}, task_heads={"other": "two"}, search=PLAIN, distil=None
    )
    opened = open_campaign(load_campaign(str(path)), Display())
    assert distillation(opened) is not None
    tasks, owners = sources_to_distil(opened.setup({}))
    assert {task.name: owners[task.name] for task in tasks} == {"one": "one", "two": "two", "three": "three"}


@pytest.fixture
def checked(campaign_file, tmp_path, monkeypatch):
    """Checks the tiny campaign with changes; the tasks named `custom` are scored by a function."""
    (tmp_path / "a_judge.py").write_text(EVALUATOR)
    monkeypatch.syspath_prepend(tmp_path)

    def run(custom=(), splits=("train", "validation", "test"), **changes):
        path = campaign_file(directory="out", selection={"mode": "all"}, **changes)
        settings = yaml.safe_load(path.read_text())
        for name in custom:
            settings["tasks"][name] = CUSTOM
        for name in settings["tasks"].keys() - set(custom):
            data = settings["tasks"][name]["data"]
            settings["tasks"][name]["data"] = {split: data[split] for split in splits}
        path.write_text(yaml.safe_dump(settings))
        check(load_campaign(str(path)), Display())

    return run


ALL = ("one", "two", "three")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"custom": ALL, "search": PLAIN, "distil": {}}, "distil: there is nothing to train on"),
        (
            {"custom": ("two",), "search": PLAIN, "distil": {"weights": {"one": 2.0, "two": 0.5}}},
            "distil.weights: 'two' teaches nothing.*Teachers are one, three;",
        ),
        (
            {"custom": ("three",), "search": PLAIN, "distil": {"temperatures": {"three": 2.0}}},
            "distil.temperatures: 'three' teaches nothing",
        ),
        ({"custom": ALL, "search": {**PLAIN, "gradient": {}}}, "search.gradient: there is nothing to train on"),
        ({"splits": ("validation",), "search": PLAIN, "distil": {}}, "distil: task 'one' has no train examples"),
        (
            {"splits": ("validation",), "search": {**PLAIN, "gradient": {"loss": "distil"}}},
            "search.gradient: task 'one' has no train examples",
        ),
        ({"search": {"methods": ["ties"], "gradient": {}}}, "no method of the search is linear"),
        ({"search": {**PLAIN, "gradient": {"methods": ["regmean"]}}}, "search.gradient.methods: 'regmean'"),
        ({"search": {**PLAIN, "theory_starts": True}}, "theory needs a method that asks for"),
        ({"custom": ("two",), "search": {**PLAIN, "objective": "expected_mean"}}, "task 'two' gives none"),
        (
            {"custom": ("two",), "search": {**PLAIN, "objective": "expected_weighted", "weights": {"two": 1}}},
            "task 'two' gives none",
        ),
        ({"custom": ("two",), "search": {**PLAIN, "objective": ["mean", "expected_two"]}}, "task 'two' gives none"),
    ],
)
def test_what_would_do_nothing_or_stop_later_is_refused(checked, changes, words):
    with pytest.raises(SettingsError, match=words):
        checked(**changes)


def test_normalized_needs_a_member_of_each_task_s_own(checked, tiny_campaign):
    more = {**tiny_campaign["tasks"], "other": tiny_campaign["tasks"]["two"]}
    changes = {"tasks": more, "task_heads": {"other": "two"}}
    with pytest.raises(SettingsError, match="task 'other' has none: give a member `task: other`"):
        checked(search={**PLAIN, "objective": "normalized"}, **changes)
    checked(search={**PLAIN, "objective": "mean"}, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"custom": ("two",), "search": {**PLAIN, "objective": "expected_one"}},
        {"custom": ("two",), "search": {**PLAIN, "gradient": {}}, "distil": {}},
        {"splits": ("validation",), "search": {**PLAIN, "gradient": {}}},
        {"search": {"methods": ["regmean", "task_arithmetic"], "theory_starts": True}},
    ],
)
def test_what_has_something_to_work_on_passes(checked, changes):
    checked(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "distillation on 72 unlabelled inputs"),
        ({"distil": False}, "no distillation"),
        ({"splits": ("validation",)}, "no distillation"),
        ({"custom": ("two",)}, "no distillation"),
    ],
)
def test_check_says_what_a_run_has(checked, capsys, changes, words):
    checked(**{"search": {**PLAIN, "patience": 7}, "distil": None, **changes})
    text = capsys.readouterr().err
    assert words in text
    assert "2 baselines (average, task_arithmetic at their defaults, the plain average)" in text
    assert (
        "at most 12 proposals, the best of them with other factors, then by tpe, until 7 in a row are no better" in text
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {**PLAIN, "sampler": "no_such_module:Sampler"}}, "sampler 'no_such_module:Sampler': cannot import"),
        ({"tracking": {"tensorboard": "s3://bucket/events"}}, "tracking.tensorboard: s3://bucket/events is remote"),
        (
            {"environment": {"env": {"KEY": "${IS_NOT_SET}"}}},
            "environment.env.KEY: the environment variable IS_NOT_SET",
        ),
        ({"environment": {"working_dir": "nowhere"}}, "environment.working_dir: there is no local directory"),
    ],
)
def test_settings_are_looked_at_before_the_pool(checked, tmp_path, changes, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        checked(base=str(tmp_path / "unreadable"), **changes)
