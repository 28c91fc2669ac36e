"""A campaign looks at its pool's weights once, wherever it goes on."""

import pytest

from flows.campaign.run import compute_statistics
from flows.campaign.weight_checks import examined, keep, known
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import FACTS, Directory
from flows.directory.progress import Display
from merging.checkpoints.pool import Pool
from merging.io import addresses, atomic, fact_cache, storage
from ray_tasks.evaluators.evaluator import Setup


@pytest.fixture
def campaign(campaign_file, tiny_pool, upload, unreliable, s3_at):
    root = s3_at(unreliable.url)
    for name, place in tiny_pool.items():
        upload(place, addresses.join(root, name))
    members = {name: {"checkpoint": addresses.join(root, name)} for name in tiny_pool if name != "base"}
    return load_campaign(str(campaign_file(base=addresses.join(root, "base"), members=members)))


def opened(campaign):
    return Pool.open(campaign.base, {name: member.checkpoint for name, member in campaign.members.items()})


def test_another_machine_goes_on_without_reading_a_weight(campaign, unreliable, tmp_path, monkeypatch):
    pool, place = opened(campaign), str(tmp_path / "campaign")
    first = examined(campaign, pool, place, Display())
    fingerprints = pool.fingerprints()
    keep(pool, place)
    assert "s3" not in storage.read_text(addresses.join(place, FACTS))
    assert len(known(pool)) == 4 + 3

    monkeypatch.setattr(fact_cache, "_facts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    again = opened(campaign)
    unreliable.reset()
    assert examined(campaign, again, place, Display()) == first
    assert again.fingerprints() == fingerprints
    assert {method for method, _, _ in unreliable.requests} == {"HEAD"}


def test_weights_come_once_where_evaluators_run_on_this_machine(campaign, unreliable, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    unreliable.reset()
    pool = opened(campaign)
    examined(campaign, pool, str(tmp_path / "campaign"), Display())
    members = {name: member.checkpoint for name, member in campaign.members.items()}
    material = Setup(campaign.base, members, (), {}, {}, {}, {}, facts=known(pool)).material(resident=True)
    assert all(material.pool.member_weight(member, name).numel() for member in members for name in pool.weights)
    stored = sum(place.nbytes for place in (pool.base, *(member.checkpoint for member in pool.members.values())))
    assert stored < unreliable.sent < 1.5 * stored  # the rest is headers, read at each opening


def test_statistics_computed_ahead_leave_what_they_learnt_for_the_campaign(campaign, unreliable, tmp_path, monkeypatch):
    search = campaign.search.model_copy(update={"methods": {"average": campaign.search.methods["average"]}})
    ahead = campaign.model_copy(update={"directory": str(tmp_path / "out"), "search": search})  # needs no statistics
    compute_statistics(ahead, [], None, Display())
    monkeypatch.setattr(fact_cache, "_facts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    again = opened(campaign)
    unreliable.reset()
    examined(campaign, again, ahead.directory, Display())
    again.fingerprints()
    assert {method for method, _, _ in unreliable.requests} == {"HEAD"}
    Directory(ahead.directory).check(ahead)


@pytest.mark.parametrize("spoilt", ["not json", "[1]", '{"x": 2}'])
def test_what_is_no_record_is_found_anew(campaign, tmp_path, spoilt):
    place = str(tmp_path / "campaign")
    atomic.write_text(addresses.join(place, FACTS), spoilt)
    assert set(examined(campaign, opened(campaign), place, Display())) == {"one", "two", "three"}
