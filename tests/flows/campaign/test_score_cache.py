"""Scores that one campaign kept, in another one."""

import sys
from io import StringIO

import pytest
from rich.console import Console

from flows.campaign.run import check, run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import SettingsError
from search.ledger.ledger import Ledger

SEARCH = {"candidates": 8, "methods": ["average", "task_arithmetic", "ties", "fisher"], "pruning": "wilcoxon"}
RESOURCES = {"evaluators": 1}
MEASURED = ("scores", "standard_errors", "losses", "expected_errors", "examples", "objective", "status", "report")


def said():
    return Display(Console(file=StringIO(), width=400))


def rows(directory):
    return {(row.candidate, row.split): row for row in Ledger(str(directory / "ledger")).rows()}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_second_campaign_measures_nothing_but_what_is_damaged(campaign_file, tmp_path):
    settings = {"search": SEARCH, "resources": RESOURCES, "test": {"top": 1}, "evaluation": {"cache": "scores"}}
    settings["statistics"] = {"cache": str(tmp_path / "statistics")}
    run(load_campaign(str(campaign_file(directory=str(tmp_path / "first"), **settings))), said())
    first = rows(tmp_path / "first")
    assert not any(name.startswith("cached:") for row in first.values() for name in row.proxies)
    files = sorted((tmp_path / "scores").iterdir())
    assert len(files) == 3 * len(first)  # one for each task
    damaged = files[len(files) // 2]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-40])
    display = said()
    run(load_campaign(str(campaign_file(directory=str(tmp_path / "second"), **settings))), display)
    second = rows(tmp_path / "second")
    assert first.keys() == second.keys()
    for key, row in second.items():
        assert {name: getattr(row, name) for name in MEASURED} == {name: getattr(first[key], name) for name in MEASURED}
    cached = [
        row.proxies.get(f"cached:{task}", 0) == count for row in second.values() for task, count in row.examples.items()
    ]
    assert cached.count(False) == 1
    assert sum(row.merge_seconds is None for row in second.values()) == len(second) - 1
    assert display.console.file.getvalue().count(str(damaged)) == 1
    assert damaged.read_bytes() == whole


def test_a_judge_of_one_s_own_is_never_cached(campaign_file, tiny_campaign, tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text("def judge(model, checkpoint, split, limit): return 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)
    tasks = {name: {"kind": "custom", "evaluator": "own_judge:judge"} for name in tiny_campaign["tasks"]}
    search = {"methods": ["average"], "candidates": 1}
    settings = {"search": search, "evaluation": {"cache": "scores"}, "selection": {"mode": "all"}}
    with pytest.raises(SettingsError, match=r"evaluation\.cache: the scores of 'one', 'three', 'two' depend on code"):
        check(load_campaign(str(campaign_file(tasks=tasks, **settings))), said())
    tasks["two"] = tiny_campaign["tasks"]["two"]
    display = said()
    check(load_campaign(str(campaign_file(tasks=tasks, **settings))), display)
    assert "note: evaluation.cache: 'one', 'three' is measured every time" in display.console.file.getvalue()


def test_the_place_is_relative_to_the_file_and_no_part_of_the_campaign(campaign_file, tmp_path):
    plain = load_campaign(str(campaign_file()))
    kept = load_campaign(str(campaign_file(evaluation={"cache": "scores"})))
    assert kept.evaluation.cache == str(tmp_path / "scores")
    assert kept.identity() == plain.identity()
    (tmp_path / "scores").write_text("")
    with pytest.raises(SettingsError, match="is a file"):
        check(kept, said())
