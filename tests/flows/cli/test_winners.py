"""Candidates of a campaign become checkpoints, from its directory alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.campaign.open_campaign import open_campaign
from flows.cli.app import app
from flows.cli.merge import merge_recipe
from flows.cli.winners import export_candidates, find_candidate
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import PoolError, SettingsError
from merging.io import atomic, documents
from merging.recipe import Recipe
from search.ledger.ledger import Ledger
from search.ledger.row import Row


@pytest.fixture
def campaign(campaign_file, monkeypatch, tmp_path):
    """The directory of a campaign whose methods need no statistics, and two of its candidates."""
    search = {"methods": ["average", "task_arithmetic"]}
    settings = load_campaign(str(campaign_file(directory="out", search=search, selection={"mode": "all"})))
    directory = Directory(str(tmp_path / "out"))
    directory.claim(settings, open_campaign(settings, Display()).fingerprints)
    rows = []
    for place, recipe in enumerate(
        [Recipe("average", {"one": 1.0, "two": 1.0}), Recipe("task_arithmetic", {"one": 0.3, "three": 0.6}, {})]
    ):
        scores = {"one": 0.9 - place / 10, "two": 0.5, "three": 0.6}
        rows.append(
            Row(
                "tiny", recipe.identity, "validation", "search", "complete", recipe.method, recipe.members,
                recipe.scaling, recipe.parameters, trial=place, objective=sum(scores.values()) / 3, scores=scores,
            )
        )  # fmt: skip
    Ledger(directory.ledger, "tiny").extend(rows)
    monkeypatch.chdir(tmp_path)
    return directory, rows


def test_each_is_a_checkpoint_with_its_recipe_heads_and_card(campaign, tmp_path):
    directory, rows = campaign
    places = export_candidates("out", rows, Display())
    assert list(places) == [row.candidate for row in rows]
    for row in rows:
        place = Path(places[row.candidate])
        assert place == tmp_path / "out" / "exports" / row.candidate
        card = (place / "README.md").read_text()
        assert f"Candidate `{row.candidate}`, trial {row.trial}" in card
        assert f"`one` {100 * row.scores['one']:.1f}, `two` 50.0" in card
        assert (place / "heads" / "two" / "head.safetensors").exists()
        recipe = yaml.safe_load((place / "recipe.yaml").read_text())
        assert (recipe["method"], recipe["scaling"]) == (row.method, dict(row.scaling))
        merge_recipe(str(place / "recipe.yaml"), str(tmp_path / row.method), None, 1.0, Display())
        assert Checkpoint.open(str(place)).fingerprint == Checkpoint.open(str(tmp_path / row.method)).fingerprint
    before = {path: path.stat().st_mtime_ns for path in Path(directory.path).rglob("*")}
    reported = CliRunner().invoke(app, ["portfolio", "out", "-k", "2", "--tolerance", "1", "--export", "--json"])
    assert reported.exit_code == 0, reported.output
    assert {entry["candidate"]: entry["path"] for entry in json.loads(reported.stdout)} == places
    assert {path: path.stat().st_mtime_ns for path in Path(directory.path).rglob("*")} == before


def test_another_pool_is_refused(campaign):
    directory, rows = campaign
    pool = documents.read_json(directory / "pool.json")
    pool["checkpoints"]["two"] = "another"
    atomic.write_json(directory / "pool.json", pool)
    with pytest.raises(PoolError, match="'two' is not the checkpoint that this campaign was run on"):
        export_candidates(directory.path, rows, Display())
    assert not Path(directory.path, "exports").exists()


def test_the_best_merge_or_a_candidate_by_how_its_name_begins(campaign):
    directory, rows = campaign
    made = Recipe("distilled", {"one": 1.0, "two": 1.0}, {"start": rows[0].candidate})
    best = replace(rows[0], candidate=made.identity, method="distilled", parameters=made.parameters, objective=0.99)
    Ledger(directory.ledger, "tiny").append(best)
    assert find_candidate("out", None).candidate == rows[0].candidate
    assert find_candidate("out", made.identity[:8]).method == "distilled"
    with pytest.raises(SettingsError, match="no candidate 'nobody'"):
        find_candidate("out", "nobody")
    exported = CliRunner().invoke(app, ["export", "out", rows[1].candidate])
    assert exported.exit_code == 0, exported.output
    assert Path(exported.stdout.strip(), "config.json").exists()
