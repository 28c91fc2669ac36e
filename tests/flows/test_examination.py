"""A campaign looks at its pool's weights once, wherever it goes on."""

import pytest

from flows.config import load_campaign
from flows.examination import FILE, examined, keep, known
from flows.progress import Display
from merging import memory, storage
from merging.pool import Pool


@pytest.fixture
def campaign(campaign_file, tiny_pool, upload, unreliable, s3_at):
    root = s3_at(unreliable.url)
    for name, place in tiny_pool.items():
        upload(place, storage.join(root, name))
    members = {name: {"checkpoint": storage.join(root, name)} for name in tiny_pool if name != "base"}
    return load_campaign(str(campaign_file(base=storage.join(root, "base"), members=members)))


def opened(campaign):
    return Pool.open(campaign.base, {name: member.checkpoint for name, member in campaign.members.items()})


def test_another_machine_goes_on_without_reading_a_weight(campaign, unreliable, tmp_path, monkeypatch):
    pool, place = opened(campaign), str(tmp_path / "campaign")
    first = examined(campaign, pool, place, Display())
    fingerprints = pool.fingerprints()
    keep(pool, place)
    assert "s3" not in storage.read_text(storage.join(place, FILE))
    assert len(known(pool)) == 4 + 3

    monkeypatch.setattr(memory, "_facts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    again = opened(campaign)
    unreliable.reset()
    assert examined(campaign, again, place, Display()) == first
    assert again.fingerprints() == fingerprints
    assert {method for method, _, _ in unreliable.requests} == {"HEAD"}


@pytest.mark.parametrize("spoilt", ["not json", "[1]", '{"x": 2}'])
def test_what_is_no_record_is_found_anew(campaign, tmp_path, spoilt):
    place = str(tmp_path / "campaign")
    storage.write_text(storage.join(place, FILE), spoilt)
    assert set(examined(campaign, opened(campaign), place, Display())) == {"one", "two", "three"}
