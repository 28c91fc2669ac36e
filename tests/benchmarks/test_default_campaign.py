"""The comparison beside a finished campaign, on tiny models."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from flows.campaign.baselines import ALL_DATA
from flows.directory.progress import Display
from merging.recipe import Recipe
from merging.tasks.task import Score
from search.candidate import Candidate, Measurement, Outcome, Provenance, make_row
from search.ledger.ledger import Ledger

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are no part of what is installed

from benchmarks import default_campaign
from benchmarks.default_campaign import Comparison, Tuned, table

SPENT = 40


@pytest.fixture
def comparison(tiny_campaign, tiny_pool, tmp_path) -> Comparison:
    """Of a campaign that evaluated `SPENT` examples and found the plain average."""
    settings = copy.deepcopy(tiny_campaign) | {"directory": str(tmp_path)}
    (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / ALL_DATA).parent.mkdir()
    (tmp_path / ALL_DATA).symlink_to(tiny_pool["two"])
    recipe = Recipe("average", dict.fromkeys(settings["members"], 1.0))
    scores = {"one": Score(0.5, 0.1, SPENT, "accuracy", is_mean=True)}
    outcome = Outcome(Candidate(recipe, origin="anchor", trial=0), Measurement(scores))
    ledger = Ledger(str(tmp_path / "ledger"), "tiny")
    ledger.append(make_row(outcome, {"mean": 0.5}, None, Provenance("tiny")))
    return Comparison(tmp_path, Display(Console(quiet=True)), examples=12)


def test_the_best_of_a_peer_is_chosen_on_validation_and_paired_on_test(comparison, monkeypatch):
    values = (0.1, 0.9, 1.5)
    peers = {"peer": Tuned("task_arithmetic", {}, "scaling", values), "mean": Tuned("average", {})}
    monkeypatch.setattr(default_campaign, "PEERS", peers)
    monkeypatch.setattr(default_campaign, "TESTED", 1)
    first, second, *others = comparison.tuned(1, [])
    bench = comparison.bench
    recipes = [Recipe("task_arithmetic", dict.fromkeys(bench.members, value)) for value in values]
    means = [bench.measure(recipe, "validation").mean for recipe in recipes]
    peer = first if first.name == "peer" else second
    assert peer.validation == max(means)
    assert peer.chosen == f"scaling {values[int(np.argmax(means))]:g}"
    assert first.validation >= second.validation
    assert first.test is not None
    assert second.test is None
    assert {arm.name for arm in others} == {"regmean++", "task arithmetic, factors by descent without labels"}
    monkeypatch.setattr(default_campaign, "DATA_FREE", {"own": peers["peer"]})
    (own,) = comparison.data_free(1, [])
    assert (own.validation, own.chosen) == (peer.validation, peer.chosen)
    assert own.test.mean == bench.measure(recipes[int(np.argmax(means))]).mean
    winner = bench.measure(comparison.winner.recipe)
    shown = table(winner, [first, second]).iloc[0]
    gaps = [winner.values[task] - first.test.values[task] for task in winner.values]
    assert shown["campaign_less_this"] == pytest.approx(100 * np.mean([gap.mean() for gap in gaps]), abs=0.01)
    assert shown["error"] == pytest.approx(
        100 * np.sqrt(sum(gap.var() / len(gap) for gap in gaps)) / len(gaps), abs=0.01
    )


def test_others_spend_as_much_and_what_is_measured_is_kept(comparison, monkeypatch):
    assert comparison.spent == SPENT
    arms = [
        *comparison.tpe(1, []),
        *comparison.labels(1, []),
        *comparison.inputs(1, [4]),
        *comparison.unseen(1, []),
        *comparison.references(1, []),
    ]
    groups = ["tpe", "labels", "inputs", "unseen", "unseen", "references", "references"]
    assert [arm.group for arm in arms] == groups
    unseen, training = (comparison.bench.own_tasks(split)["one"] for split in ("validation", "train"))
    assert (
        unseen.data_fingerprint("train")
        == training.data_fingerprint("validation")
        != training.data_fingerprint("train")
    )
    assert arms[0].chosen.endswith(" of 2")  # of 36 examples each
    assert all(len(values) == 12 for arm in arms for values in arm.test.values.values())
    monkeypatch.setattr(default_campaign, "distil", None)
    monkeypatch.setattr(default_campaign, "tune", None)
    again = [*comparison.tpe(1, []), *comparison.labels(1, []), *comparison.inputs(1, [4])]
    assert [arm.test.mean for arm in again] == [arm.test.mean for arm in arms[:3]]
