from pathlib import Path

import pandas as pd
import pytest

from flows.quickstart.quickstart import POOLS, make_campaign
from flows.quickstart.shipped_pool import first_examples, written
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


def test_first_examples(tmp_path):
    def make():
        return {"one": {split: pd.DataFrame({"words": [[split, str(i)] for i in range(5)]}) for split in SPLITS}}

    files = written(tmp_path / "data", ["one"], "key", make)
    few = first_examples(files, tmp_path / "few", 3)
    assert [len(pd.read_parquet(few["one"][split])) for split in SPLITS] == [3, 3, 3]
    assert pd.read_parquet(few["one"]["test"])["words"].map(list).tolist() == [["test", str(i)] for i in range(3)]
    assert len(pd.read_parquet(files["one"]["test"])) == 5
    assert len(pd.read_parquet(first_examples(files, tmp_path / "all", 9)["one"]["train"])) == 5
