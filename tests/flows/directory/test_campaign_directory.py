from dataclasses import replace

import pytest

from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from merging.errors import LedgerError
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


def test_a_selection_that_failed_may_be_corrected_in_place(campaign_file, make, tmp_path):
    """Base and members, measured before it, say nothing of it; a candidate that was merged from a subset does."""
    directory = Directory(str(tmp_path / "out"))
    directory.claim(load_campaign(str(campaign_file())), {})
    ledger = Ledger(directory.ledger, "tiny")
    ledger.append(replace(make.references()[0], campaign="tiny"))
    corrected = load_campaign(str(campaign_file(selection={"draws": 9})))
    directory.check(corrected)
    ledger.append(replace(make.candidates(1)[0], campaign="tiny"))
    with pytest.raises(LedgerError, match="holds another campaign .*differs in selection"):
        directory.check(corrected)
