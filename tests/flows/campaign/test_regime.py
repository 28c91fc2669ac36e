"""The sharded regime, from the campaign file to the ledger."""

import pytest

from flows.campaign.run import compute_statistics, run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import ClusterError
from search.ledger.ledger import Ledger

SEARCH = {"methods": ["average", "ties", "fisher"], "candidates": 6, "sampler": "random", "line_search": False}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def rows(path, tmp_path, name, display=None, **resources):
    campaign = load_campaign(
        str(
            path(
                directory=str(tmp_path / name),
                search=SEARCH,
                selection={"mode": "all"},
                statistics={"cache": str(tmp_path / "statistics")},
                resources={"evaluators": 1, **resources},
            )
        )
    )
    run(campaign, display or Display())
    return {
        (row.candidate, row.split): (row.origin, row.status, row.scores, row.losses, row.objective, row.report)
        for row in Ledger(str(tmp_path / name / "ledger")).rows()
    }


def test_a_sharded_campaign_fills_the_same_ledger(campaign_file, tmp_path, capsys):
    sharded = rows(campaign_file, tmp_path, "sharded", regime="sharded", shards=2)
    said = capsys.readouterr().err
    assert "sharded: 2 shards on 1 node read" in said
    assert "a candidate: about" in said
    assert sharded == rows(campaign_file, tmp_path, "resident", regime="resident", shards=2)
    said = capsys.readouterr().err
    assert "sharded" not in said
    assert "each evaluator merges by itself, and resources.shards is not used" in said


def test_a_plan_that_does_not_fit_is_refused_before_any_candidate(campaign_file, tmp_path):
    with pytest.raises(ClusterError, match=r"a shard takes .* resources.shard_memory allows 0.001 GB"):
        rows(campaign_file, tmp_path, "small", regime="sharded", shard_memory=0.001)
    assert not list((tmp_path / "small").rglob("*.parquet"))


def test_a_campaign_for_gpus_that_the_cluster_has_not_is_refused_before_statistics(campaign_file, tmp_path):
    for settings, says in (
        ({"accelerator_type": "H100"}, r"no node has accelerator type H100: the cluster's accelerator types are none"),
        (
            {"labels": {"market": "spot"}},
            "no node has label market=spot: its nodes. values of label market are none; correct",
        ),
        ({"gpus": 4}, r"an evaluator of 4 GPUs fits no node: the largest has 0; lower resources.gpus"),
        (
            {"memory": 1e5},
            r"an evaluator that asks for 1e\+05 GB fits no node: the most that one lends is .*resources.memory",
        ),
    ):
        with pytest.raises(ClusterError, match=says):
            rows(campaign_file, tmp_path, "refused", **{"evaluators": None, **settings})
    assert not list((tmp_path / "refused").rglob("*.safetensors"))


def test_a_cluster_is_looked_at_before_the_pool_is_read(campaign_file, tmp_path, monkeypatch):
    path = campaign_file(
        directory=str(tmp_path / "out"), base=str(tmp_path / "unreadable"), resources={"accelerator_type": "H100"}
    )
    monkeypatch.setenv("RAY_ADDRESS", "joined already")
    with pytest.raises(ClusterError, match="no node has accelerator type H100"):
        run(load_campaign(str(path)), Display())


def test_statistics_do_not_wait_for_nodes_that_are_not_there(campaign_file, tmp_path):
    path = campaign_file(directory=str(tmp_path / "out"), resources={"labels": {"market": "spot"}})
    with pytest.raises(ClusterError, match="no node has label market=spot"):
        compute_statistics(load_campaign(str(path)), ["gram"], None, Display())
