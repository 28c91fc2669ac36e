import errno
import fcntl
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flows.cli.status import read_status
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from merging.errors import LedgerError, PoolError
from search.ledger.ledger import Ledger


def test_a_corrected_file_may_take_a_directory_where_nothing_was_measured(campaign_file, make, tmp_path):
    """A run that ended with an error before its first candidate should not ask for another directory."""
    directory = Directory(str(tmp_path / "out"))
    directory.claim(load_campaign(str(campaign_file())), {})
    corrected = load_campaign(str(campaign_file(seed=1)))
    directory.check(corrected)
    Ledger(directory.ledger, "tiny").append(replace(make.references()[0], campaign="tiny"))
    with pytest.raises(LedgerError, match="holds another campaign .*differs in seed"):
        directory.check(corrected)
    with pytest.raises(LedgerError, match="holds another campaign .*differs in engine"):
        directory.check(load_campaign(str(campaign_file(engine={"kind": "vllm"}))))


def test_a_selection_that_failed_may_be_corrected_in_place(campaign_file, make, tmp_path):
    """Base and members, measured before it, say nothing of it; a candidate that was merged from a subset does."""
    directory = Directory(str(tmp_path / "out"))
    directory.claim(load_campaign(str(campaign_file())), {})
    ledger = Ledger(directory.ledger, "tiny")
    ledger.append(replace(make.references()[0], campaign="tiny"))
    corrected = load_campaign(str(campaign_file(selection={"draws": 9})))
    directory.check(corrected)
    directory.check(load_campaign(str(campaign_file(selection={"draws": 9}, search={"candidates": 3, "confirm": 2}))))
    ledger.append(replace(make.candidates(1)[0], campaign="tiny"))
    with pytest.raises(LedgerError, match="holds another campaign .*differs in selection"):
        directory.check(corrected)


@pytest.mark.parametrize("budget", [{"candidates": 9}, {"seconds": 9.0}, {"confirm": 9}, {"patience": 9}])
def test_a_finished_campaign_goes_on_with_a_larger_budget(campaign_file, tmp_path, budget):
    directory = Directory(str(tmp_path / "out"))
    campaign = load_campaign(str(campaign_file()))
    directory.claim(campaign, {})
    directory.finish(campaign)
    for path in (directory.report, directory.best + "/config.json"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    assert directory.is_finished(campaign)
    assert not directory.is_finished(load_campaign(str(campaign_file(search=budget))))
    assert not directory.is_finished(load_campaign(str(campaign_file(seed=1))))


def test_a_finished_campaign_stays_finished_when_the_program_learns_new_settings(campaign_file, tmp_path):
    """Its files know nothing of what a later version can set, and mean the defaults."""
    directory = Directory(str(tmp_path / "out"))
    campaign = load_campaign(str(campaign_file(search={"candidates": 9, "cpu_hours": 2.0}, baselines=["ensemble"])))
    directory.claim(campaign, {})
    directory.finish(campaign)
    for path in (directory.report, directory.best + "/config.json"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    file, done = tmp_path / "out/campaign.yaml", tmp_path / "out/done.json"
    settings, spent = yaml.safe_load(file.read_text()), json.loads(done.read_text())
    del settings["search"]["gradient"], settings["engine"], settings["search"]["confirm"], spent["confirm"]
    file.write_text(yaml.safe_dump(settings))
    search = campaign.search
    listed = ["hash", 9, None, campaign.test.top, None, search.patience, search.min_delta, search.confirm]
    for written in (spent, [*listed, None, 2.0, "ensemble"]):
        done.write_text(json.dumps(written))
        assert read_status(str(directory.path)).state == "finished"
        assert directory.is_finished(campaign)
        more = campaign.model_copy(update={"baselines": ("ensemble", "all_data")})
        assert not directory.is_finished(more)
    for damaged in ([], ["hash", 8], {"candidates": 8}, "finished", None):
        done.write_text(json.dumps(damaged))
        assert not directory.is_finished(campaign)


def test_a_changed_configuration_is_noticed_and_other_words_for_the_same_are_not(campaign_file, make, tmp_path):
    """The weights' fingerprints are the same, and they compute something else."""
    directory = Directory(str(tmp_path / "out"))
    config = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "transformers_version": "4",
    }
    pool = {"checkpoints": {"one": "a"}, "data": {}, "configurations": {"one": config}}
    directory.claim(load_campaign(str(campaign_file())), pool)
    Ledger(directory.ledger, "tiny").append(replace(make.references()[0], campaign="tiny"))
    same = {"model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None, "use_cache": False}
    directory.check_pool(pool | {"configurations": {"one": same}})
    for change in ({"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3}, {"n_head": 6}):
        with pytest.raises(PoolError, match=f"'one': config.json has {next(iter(change))} = "):
            directory.check_pool(pool | {"configurations": {"one": config | change}})


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_no_other_driver_and_has_a_lease(monkeypatch, tmp_path, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    for module, seconds in (("BEAT", 0.1), ("SILENCE", 0.5), ("SETTLE", 0.05)):
        monkeypatch.setattr(f"flows.directory.lock.{module}", seconds)
    directory = Directory(str(tmp_path / "out"))
    with directory.locked():
        time.sleep(0.3)
        with pytest.raises(LedgerError, match="another mergequest is running this campaign"), directory.locked():
            pytest.fail("two at once")
    with directory.locked():
        pass


def test_a_directory_is_locked_once(tmp_path):
    directory = Directory(str(tmp_path / "out"))
    again = pytest.raises(LedgerError, match="another mergequest is running this campaign")
    with directory.locked(), again, directory.locked():
        pytest.fail("two at once")
    with pytest.raises(KeyboardInterrupt), directory.locked():
        raise KeyboardInterrupt
    with directory.locked():
        pass
