"""What `resources.precision: auto` comes to."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from flows.campaign import precision
from flows.campaign.open_campaign import open_campaign
from flows.campaign.precision import choose
from flows.campaign.run import run
from flows.cli.status import read_status
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.evaluation.live_models import LiveModels
from merging.evaluation.steps import Measurement, Trace
from merging.recipe import base_recipe
from merging.tasks.task import Score
from search.ledger.ledger import Ledger


def measured(values, seconds):
    scores = {task: Score(float(np.mean(own)), 0.0, len(own), "accuracy", is_mean=True) for task, own in values.items()}
    trace = Trace([scores], influences={task: np.array(own, np.float32) for task, own in values.items()})
    return Measurement(scores, evaluate_seconds=seconds, trace=trace)


def flipped(values, *places):
    other = list(values)
    for place in places:
        other[place] = 1 - other[place]
    return other


RIGHT = [1, 0, 1, 1, 0, 1, 0, 1, 1, 1] * 10


def test_the_same_scores_sooner_are_taken():
    choice = choose(measured({"a": RIGHT, "b": RIGHT}, 2.0), measured({"a": RIGHT, "b": RIGHT}, 1.5))
    assert (choice.precision, choice.difference, choice.error) == ("bfloat16", 0.0, 0.0)
    assert "1.50 s in bfloat16, 2.00 s in float32" in choice.why


@pytest.mark.parametrize("seconds", [2.0, 2.1])
def test_what_is_not_faster_is_not(seconds):
    choice = choose(measured({"a": RIGHT}, 2.0), measured({"a": RIGHT}, seconds))
    assert choice.precision == "float32"
    assert "not faster" in choice.why


def test_the_difference_is_paired_and_a_mean_over_tasks():
    worse = flipped(RIGHT, 0, 2, 3, 5, 7, 8)  # six of a hundred lost, none won
    choice = choose(measured({"a": RIGHT, "b": RIGHT}, 2.0), measured({"a": worse, "b": RIGHT}, 1.0))
    differences = np.array(worse) - np.array(RIGHT)
    assert choice.difference == pytest.approx(-0.03)
    assert choice.error == pytest.approx(np.sqrt(differences.var(ddof=1) / 100) / 2)
    assert choice.precision == "float32"
    assert "-0.0300 ± 0.0119 in bfloat16" in choice.why
    either = flipped(RIGHT, 0, 2, 1, 4, 3, 6)  # three lost, three won
    assert choose(measured({"a": RIGHT}, 2.0), measured({"a": either}, 1.0)).precision == "bfloat16"


def test_what_gives_no_values_of_examples_is_not_compared():
    whole = Measurement({"a": Score(0.5, 0.1, 0, "score")}, evaluate_seconds=2.0)
    choice = choose(whole, Measurement(whole.scores, evaluate_seconds=1.0))
    assert choice.precision == "float32"
    assert choice.difference is None


def test_a_gpu_that_emulates_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not precision.has_bfloat16()


def said():
    return Display(Console(file=StringIO(), width=400))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_campaign_decides_once(campaign_file, tmp_path, monkeypatch):
    settings = {
        "search": {"candidates": 2, "methods": ["average"]},
        "selection": {"mode": "all"},
        "resources": {"evaluators": 1, "precision": "auto"},
        "test": {"top": 1},
        "directory": str(tmp_path / "out"),
    }
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "choose", _in_bfloat16)
    display = said()
    run(load_campaign(str(campaign_file(**settings))), display)
    kept = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert kept["precision"] == "bfloat16"
    assert min(kept["seconds"].values()) > 0
    assert kept["error"] < 0.2
    assert kept["why"] in display.console.file.getvalue()
    assert kept["why"] in read_status(str(tmp_path / "out")).as_text()
    assert kept["why"] in (tmp_path / "out" / "report.html").read_text()
    rows = {row.candidate: row for row in Ledger(str(tmp_path / "out" / "ledger")).rows() if row.split == "validation"}

    monkeypatch.setattr(precision, "has_bfloat16", lambda: 1 / 0)
    settings["search"]["candidates"] = 3
    again = said()
    run(load_campaign(str(campaign_file(**settings))), again)
    assert json.loads((tmp_path / "out" / "precision.json").read_text()) == kept
    assert "Precision: float32 or bfloat16" not in again.console.file.getvalue()

    opened = open_campaign(load_campaign(str(campaign_file(**settings))), said())
    tasks, owners = list(opened.tasks.values()), opened.campaign.owners()
    live = LiveModels(opened.setup({}).material(), tasks, owners, torch.device("cpu"))
    row = rows[base_recipe().identity]
    apart = {}
    for name in ("float32", "bfloat16"):  # threads round otherwise, but less than precisions do
        scores = live.measure(base_recipe(), "validation", precision=name).scores
        apart[name] = sum(abs(score.loss - row.losses[task]) for task, score in scores.items())
    assert apart["bfloat16"] < apart["float32"]


def _in_bfloat16(float32, bfloat16):
    """The real comparison, whatever the machine's speed."""
    return choose(Measurement(float32.scores, evaluate_seconds=1e9, trace=float32.trace), bfloat16)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_without_the_hardware_nothing_is_tried(campaign_file, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    monkeypatch.setattr(precision, "choose", lambda *measured: 1 / 0)
    display = said()
    settings = {"search": {"candidates": 1, "methods": ["average"]}, "selection": {"mode": "all"}, "test": {"top": 1}}
    settings |= {"resources": {"evaluators": 1, "precision": "auto"}, "directory": str(tmp_path / "out")}
    run(load_campaign(str(campaign_file(**settings))), display)
    assert json.loads((tmp_path / "out" / "precision.json").read_text())["seconds"] == {}
    assert "float32: not every evaluator's hardware has bfloat16" in display.console.file.getvalue()
