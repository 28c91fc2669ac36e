import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flows.campaign.open_campaign import open_campaign
from flows.campaign.run import run
from flows.campaign.selection import member_similarity
from flows.cli.app import app
from flows.cli.portfolio import as_json, as_text
from flows.config.campaign_file import dump, load_campaign
from flows.directory.progress import Display
from merging.errors import SettingsError
from merging.statistics import STATISTICS, measure_shard
from search.ledger.ledger import Ledger
from search.subsets.candidate_portfolio import portfolio


def test_the_sampler_of_subsets_has_every_one_to_draw_from(campaign_file, tmp_path):
    campaign = load_campaign(str(campaign_file(search={"sampler": "quality_diversity"})))
    assert campaign.selection.mode == "every"
    again = tmp_path / "again.yaml"
    again.write_text(dump(campaign))
    assert load_campaign(str(again)) == campaign
    settings = {"search": {"sampler": "quality_diversity"}, "selection": {"mode": "dpp-map"}}
    assert load_campaign(str(campaign_file(**settings))).selection.mode == "dpp-map"
    assert load_campaign(str(campaign_file())).selection.mode == "dpp-map"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selection": {"mode": "greedy-forward", "method": "slerp"}}, "'slerp' must be one of search.methods"),
        ({"selection": {"mode": "greedy-soup", "method": "tie"}}, "'tie' must be one of search.methods"),
        ({"selection": {"mode": "greedy"}}, "selection.mode"),
        ({"search": {"sampler": "quality_diversity", "sampler_arguments": {"strenght": 1}}}, "Did you mean 'strength'"),
        ({"search": {"sampler": "quality_diversity", "sampler_arguments": {"sampler": "tp"}}}, "Did you mean 'tpe'"),
    ],
)
def test_mistakes_are_found_before_work_starts(campaign_file, changes, words):
    with pytest.raises(SettingsError, match=words):
        load_campaign(str(campaign_file(**changes)))


def test_the_paper_s_kernel_is_named_as_a_whole_and_setting_by_setting(campaign_file, tmp_path):
    campaign = load_campaign(str(campaign_file(selection={"kernel": "paper", "quality": "gain"})))
    selection = campaign.selection
    assert (selection.examples, selection.centered, selection.norm) == ("validation", False, "unit")
    again = tmp_path / "again.yaml"
    again.write_text(dump(campaign))
    assert load_campaign(str(again)) == campaign
    with pytest.raises(SettingsError, match="`kernel: paper` has centered: False; leave one of the two out"):
        load_campaign(str(campaign_file(selection={"kernel": "paper", "quality": "gain", "centered": True})))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_paper_s_similarity_is_the_mean_cosine_over_validation_examples(campaign_file, tmp_path):
    campaign = load_campaign(str(campaign_file(selection={"kernel": "paper", "quality": "gain"})))
    opened = open_campaign(campaign, Display())
    result = member_similarity(opened, str(tmp_path / "cache"), Display())
    statistic = STATISTICS["representation"](campaign.statistics.representation)
    rows = {member: [] for member in opened.pool.members}
    for task in opened.tasks.values():
        for member, own in rows.items():
            partial = measure_shard(task, statistic, "validation", 0, 16, model=opened.task_of(member).load_model())
            own.append(statistic.finalize(partial)["representation"].double())
    unit = [torch.nn.functional.normalize(torch.cat(own), dim=1) for own in rows.values()]
    expected = torch.tensor([[float((a * b).sum(1).mean()) for b in unit] for a in unit])
    torch.testing.assert_close(torch.tensor(result), expected.double(), rtol=0, atol=1e-6)


def test_a_portfolio_is_told_as_a_table_and_as_json(make):
    rows = portfolio(make.full(), 4)
    lines = as_text(rows).splitlines()
    assert len(lines) == 5
    assert all(row.candidate in line for row, line in zip(rows, lines[1:], strict=True))
    assert lines[0].split()[:4] == ["candidate", "method", "objective", "amazon"]
    result = json.loads(as_json(rows))
    assert [entry["candidate"] for entry in result] == [row.candidate for row in rows]
    assert result[0]["similarity"] == 0.0
    assert result[1]["recipe"] == rows[1].recipe.as_dict()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_campaign_that_finds_its_subsets_by_measuring_and_draws_among_them(campaign_file, tmp_path):
    path = campaign_file(
        directory="out",
        selection={"mode": "greedy-forward", "sizes": [1, 2], "method": "task_arithmetic"},
        search={
            "methods": ["average", "task_arithmetic"],
            "candidates": 10,
            "sampler": "quality_diversity",
            "sampler_arguments": {"sampler": "random", "strength": 3.0},
        },
        resources={"evaluators": 1},
    )
    run(load_campaign(str(path)), Display())
    directory = tmp_path / "out"
    selection = json.loads((directory / "selection.json").read_text())
    assert selection["mode"] == "greedy-forward"
    assert [len(subset) for subset in selection["subsets"]] == [1, 2, 3]
    assert set(selection["subsets"][0]) < set(selection["subsets"][1])
    assert selection["similarity"] is not None
    rows = Ledger(str(directory / "ledger")).rows()
    measured = [row for row in rows if row.origin == "anchor" and len(row.members) < 3]
    assert sorted(len(row.members) for row in measured) == [1, 1, 1, 2, 2]
    alone = {row.members: row.objective for row in measured if len(row.members) == 1}
    assert alone[tuple(selection["subsets"][0])] == max(alone.values())
    drawn = {row.members for row in rows if row.origin == "search"}
    assert drawn
    assert drawn <= {tuple(subset) for subset in selection["subsets"]}
    assert sum(row.origin in ("anchor", "search") for row in rows) == 10
    reported = CliRunner().invoke(app, ["portfolio", str(directory), "-k", "2", "--json"])
    assert reported.exit_code == 0, reported.output
    assert 1 <= len(json.loads(reported.output)) <= 2
    assert yaml.safe_load((directory / "campaign.yaml").read_text())["selection"]["sizes"] == [1, 2]
