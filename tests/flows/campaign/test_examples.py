"""Campaigns that measure candidates on some of the examples, on a real Ray."""

import shutil

import pandas as pd
import pytest

from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import SettingsError
from merging.io import addresses
from search.candidate import ANCHORS
from search.early_stopping.anchor_examples import Anchors
from search.ledger.ledger import Ledger
from search.objective import best

SEARCH = {"methods": ["average", "task_arithmetic"], "candidates": 8}
EVERYTHING = {"mode": "all"}
ONE = {"evaluators": 1}


def run_in(path, **search):
    settings = {"selection": EVERYTHING, "search": SEARCH | search, "resources": ONE}
    campaign = load_campaign(str(path(directory="out", **settings)))
    run(campaign, Display())
    return addresses.local_path(campaign.directory)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_winner_by_anchor_examples_is_confirmed_on_everything(campaign_file):
    directory = run_in(campaign_file, anchor_examples=10, confirm=2)
    rows = Ledger(str(directory / "ledger")).rows()
    estimated = [row for row in rows if row.split == ANCHORS]
    assert len(estimated) == 8
    assert {count for row in estimated for count in row.examples.values()} == {10}
    assert all(error > 0 for row in estimated for error in row.standard_errors.values())
    confirmed = [row for row in rows if row.split == "validation" and row.origin != "reference"]
    assert {row.candidate for row in best(estimated, 2, ANCHORS)} <= {row.candidate for row in confirmed}
    assert {row.method for row in confirmed} == {"average", "task_arithmetic"}
    assert len(confirmed) < 6
    assert {count for row in confirmed for count in row.examples.values()} == {30}
    assert best(rows)[0].candidate in (directory / "exports" / "best" / "README.md").read_text()
    first = Anchors.read(str(directory / "anchors.safetensors"))
    # what is missing is made again, and nothing is measured twice
    shutil.copytree(directory / "ledger", directory.parent / "before")
    for name in ("done.json", "anchors.safetensors"):
        (directory / name).unlink()
    run_in(campaign_file, anchor_examples=10, confirm=2)
    again = Anchors.read(str(directory / "anchors.safetensors"))
    assert all((again.tasks[task].positions == result.positions).all() for task, result in first.tasks.items())
    assert len(pd.read_parquet(directory / "ledger")) == len(pd.read_parquet(directory.parent / "before"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_campaign_prunes_its_proposals(campaign_file):
    directory = run_in(campaign_file, pruning="halving", examples_per_step=5, candidates=12)
    rows = [row for row in Ledger(str(directory / "ledger")).rows() if row.split == "validation"]
    tried = [row for row in rows if row.origin in ("anchor", "search")]
    assert len(tried) == 12
    assert all(row.status in ("complete", "pruned") for row in tried), [row.error for row in tried]
    assert all(row.status == "complete" for row in tried if row.origin == "anchor")
    assert all((row.status == "pruned") == (row.examples["one"] < 30) for row in tried)
    assert all(set(row.proxies) >= {f"entropy:{task}" for task in ("one", "two", "three")} for row in rows)
    assert best(rows)[0].status == "complete"
    assert any(row.status == "pruned" for row in tried)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"pruning": "wilcoxon", "anchor_examples": 20}, "`pruning` and `anchor_examples` do not go together"),
        ({"pruning": "halving", "objective": ["mean", "worst"]}, "`pruning` compares candidates by one objective"),
        ({"pruning": "median"}, "search.pruning: Input should be 'none', 'wilcoxon' or 'halving'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(campaign_file, search, message):
    with pytest.raises(SettingsError, match=message):
        load_campaign(str(campaign_file(search=search)))


def test_tasks_that_are_measured_whole_cannot_be_pruned(campaign_file, tiny_campaign):
    whole = {name: {"kind": "custom", "evaluator": "math:sqrt"} for name in tiny_campaign["tasks"]}
    with pytest.raises(SettingsError, match=r"search\.anchor_examples: every task here is measured whole"):
        load_campaign(str(campaign_file(tasks=whole, search={"anchor_examples": 5})))
