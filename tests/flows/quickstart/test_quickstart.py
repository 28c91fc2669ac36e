from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.quickstart.quickstart import POOLS, data_files, make_campaign
from flows.quickstart.shipped_pool import written
from merging.tasks.task import SPLITS


@pytest.mark.parametrize("name", POOLS)
def test_the_campaign_of_every_pool_says_how_members_were_trained(name, tmp_path):
    pool = POOLS[name]
    tasks = list(pool.labels) or ["one", "two"]
    files = {task: {split: tmp_path / task / f"{split}.parquet" for split in SPLITS} for task in tasks}
    campaign = make_campaign(pool, name, tmp_path, Path("base"), files, None)
    assert bool(campaign.distil) == (pool.distil is not False)
    assert campaign.training == pool.training
    assert list(campaign.search.methods) == list(pool.methods)
    assert campaign.search.candidates == pool.candidates > len(pool.methods)
    assert make_campaign(pool, name, tmp_path, Path("base"), files, 5).search.candidates == 5


def test_members_of_language_models_complete_their_own_prompts(tmp_path):
    files = {task: {split: tmp_path / task / f"{split}.parquet" for split in SPLITS} for task in ("one", "two")}
    campaign = make_campaign(POOLS["language"], "language", tmp_path, Path("base"), files, None)
    for member, settings in campaign.members.items():
        assert settings.calibration is not None
        assert settings.calibration.is_unanswered
        assert settings.calibration.data == {"train": str(files[member]["train"])}
        assert campaign.tasks[member].choices == "choices"


def test_first_examples_lie_where_a_campaign_may_begin(tmp_path):
    def make():
        return {"one": {split: pd.DataFrame({"words": [[split, str(i)] for i in range(5)]}) for split in SPLITS}}

    def data(cache, directory, progress):
        return written(directory, ["one"], "key", make)

    pool, display = replace(POOLS["tagging"], data=data, labels={}), Display()
    files = data_files(pool, tmp_path, tmp_path / "run", display)
    few = data_files(pool, tmp_path, tmp_path / "run", display, 3)
    assert [len(pd.read_parquet(few["one"][split])) for split in SPLITS] == [3, 3, 3]
    assert pd.read_parquet(few["one"]["test"])["words"].map(list).tolist() == [["test", str(i)] for i in range(3)]
    assert len(pd.read_parquet(files["one"]["test"])) == 5
    assert len(pd.read_parquet(data_files(pool, tmp_path, tmp_path / "run", display, 9)["one"]["train"])) == 5
    campaign = make_campaign(pool, "tagging", tmp_path / "run", Path("base"), few, None)
    Directory(str(tmp_path / "run")).check(campaign)
