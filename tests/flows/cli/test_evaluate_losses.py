import json
from contextlib import contextmanager, nullcontext

import pytest
import yaml

import flows.cli.evaluate
from flows.cli.evaluate import evaluate
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from merging.errors import SettingsError, TaskError
from merging.tasks.task import Score
from search.candidate import Measurement, Outcome


class Losing:
    """An executor that loses its worker a few times before it measures."""

    capacity = 2

    def __init__(self, times):
        self._left, self._queue = times, []

    def submit(self, candidate):
        self._queue.append(candidate)

    def wait(self, timeout):
        candidate = self._queue.pop(0)
        if self._left:
            self._left -= 1
            return [Outcome(candidate, error=RuntimeError("ActorDiedError"), lost=True)]
        return [Outcome(candidate, Measurement({t: Score(0.5, 0.1, 9, "accuracy") for t in ("one", "two", "three")}))]


@pytest.fixture
def lose(monkeypatch):
    opened = []

    def times(count):
        @contextmanager
        def evaluators(*given):
            opened.append(given)
            yield Losing(count)

        monkeypatch.setattr(flows.cli.evaluate, "evaluators", evaluators)
        monkeypatch.setattr(flows.cli.evaluate, "connected", lambda campaign: nullcontext())
        return opened

    return times


def test_a_worker_that_is_lost_is_not_the_end(campaign_file, lose, capsys):
    campaign = load_campaign(str(campaign_file(resources={"retries": 3})))
    lose(4)
    evaluate(campaign, ["one", "two"], "validation", Display())
    assert capsys.readouterr().out.count("0.5000 ± 0.1000") == 6
    lose(99)
    with pytest.raises(TaskError, match="one: the worker was lost 4 times: ActorDiedError"):
        evaluate(campaign, ["one"], "validation", Display())


def test_the_precision_is_the_one_that_the_campaign_chose(campaign_file, lose, tmp_path):
    campaign = load_campaign(str(campaign_file(directory="out", resources={"precision": "auto"})))
    opened = lose(0)
    evaluate(campaign, ["base"], "validation", Display())
    directory = Directory(str(tmp_path / "out"))
    directory.claim(campaign, {})
    choice = {"precision": "bfloat16", "why": "it is faster", "seconds": {}}
    (tmp_path / "out/precision.json").write_text(json.dumps(choice))
    evaluate(directory.campaign(), ["base"], "validation", Display())
    evaluate(load_campaign(str(campaign_file(directory="out", seed=7))), ["base"], "validation", Display())
    assert [given[0].precision for given in opened] == ["float32", "bfloat16", "float32"]


@pytest.fixture
def recipe(tiny_campaign, tmp_path):
    def write(name, **changes):
        members = {one: {"checkpoint": tiny_campaign["members"][one]["checkpoint"]} for one in ("one", "two")}
        members["one"]["examples"] = 7
        settings = {"base": tiny_campaign["base"], "members": members, "method": "average"} | changes
        (tmp_path / name).write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    return write


def test_the_same_recipe_twice_has_the_same_scores(campaign_file, lose, recipe, capsys):
    opened = lose(0)
    evaluate(load_campaign(str(campaign_file())), [recipe("a.yaml"), recipe("b.yaml")], "validation", Display())
    assert capsys.readouterr().out.count("±") == 6
    assert opened[0][0].examples()["one"] == 7, "a recipe's own number of examples counts"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"heads": ["encoder.layer.0.*"]}, "has heads: .*, and the campaign has not"),
        ({}, {"vocabulary": "union"}, "has vocabulary: union, and the campaign has not"),
        ({"statistics": ["x"]}, {"statistics": ["y"]}, r"have another solution of one\+two each"),
        ({"base_examples": 4}, {"base_examples": 3}, "have another number of examples of base each"),
    ],
)
def test_what_would_be_another_merge_is_refused(campaign_file, lose, recipe, first, second, said):
    lose(0)
    recipes = [recipe("a.yaml", **first), recipe("b.yaml", **second)]
    with pytest.raises(SettingsError, match=said):
        evaluate(load_campaign(str(campaign_file())), recipes, "validation", Display())
