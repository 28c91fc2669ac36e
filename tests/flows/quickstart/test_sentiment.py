import pandas as pd
import pytest

from flows.quickstart.sentiment import Sentence, SplitSettings, parse, split, write_splits
from merging.errors import StorageError
from merging.tasks.task import SPLITS


def test_parse_movie(sample):
    assert parse(sample["movie"]) == [
        Sentence("1", "The Rock is destined to be great.", 2),
        Sentence("2", "Effective but too tepid biopic", 0),  # −0.6 is clear, and its echo in line 6 is left out
        Sentence("4", "A film.", 1),  # 0.4 is neutral, 0.5 in line 3 is neither
        Sentence("5", "Lilo & Stitch!", 2),
    ]


def test_parse_groups_by_review(sample):
    assert [(s.group, s.label) for s in parse(sample["amazon"])] == [("1", 0), ("1", 1), ("2", 2), ("3", 0), ("3", 1)]


@pytest.mark.parametrize("line", ["1\t0.3", "1\thigh\ttext", "1\t0.3\ta\tb"])
def test_parse_refuses_another_form(line):
    with pytest.raises(StorageError, match="line 2 is not id"):
        parse(f"1\t0.0\tfine\n{line}\n")


@pytest.fixture
def sentences():
    return [Sentence(str(i // 7), f"sentence {i}", i % 3) for i in range(700)]


def test_split_keeps_groups_and_sizes(sentences):
    parts = split(sentences, SplitSettings({"train": 300, "validation": 50, "test": 100}))
    assert list(parts) == list(SPLITS)
    assert [len(part) for part in parts.values()] == [300, 50, 100]
    groups = [{s.group for s in part} for part in parts.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))


def test_split_follows_the_seed(sentences):
    sizes = {"train": 300, "validation": 50, "test": 100}
    assert split(sentences, SplitSettings(sizes, seed=1)) == split(sentences, SplitSettings(sizes, seed=1))
    assert split(sentences, SplitSettings(sizes, seed=1)) != split(sentences, SplitSettings(sizes, seed=2))


def test_split_fills_test_first(sentences):
    parts = split(sentences[:140], SplitSettings({"train": 300, "validation": 50, "test": 70}))
    assert len(parts["test"]) == 70
    assert len(parts["validation"]) == 50
    assert 0 < len(parts["train"]) < 50


def test_write_splits(sample, make_archive, tmp_path):
    settings = SplitSettings({"train": 2, "validation": 1, "test": 1})
    files = write_splits(make_archive(sample), tmp_path / "data", settings)
    frames = {name: pd.read_parquet(file) for name, file in files["tweets"].items()}
    assert {name: len(frame) for name, frame in frames.items()} == {"train": 1, "validation": 1, "test": 1}
    together = pd.concat(frames.values())
    assert sorted(zip(together["text"], together["label"], strict=True)) == [
        ("At home.", 1), ("So lucky <3", 2), ("Ugh.", 0)
    ]  # fmt: skip
    assert files["nyt"]["test"] == tmp_path / "data" / "nyt" / "test.parquet"


def test_write_splits_again_only_where_asked_otherwise(sample, make_archive, tmp_path):
    archive, settings = make_archive(sample), SplitSettings({"train": 2, "validation": 1, "test": 1})
    file = write_splits(archive, tmp_path / "data", settings)["movie"]["test"]
    before = file.stat().st_mtime_ns
    write_splits(archive, tmp_path / "data", settings)
    assert file.stat().st_mtime_ns == before
    write_splits(archive, tmp_path / "data", SplitSettings({"train": 1, "validation": 1, "test": 2}))
    assert len(pd.read_parquet(file)) == 2


def test_write_splits_mends_a_missing_file(sample, make_archive, tmp_path):
    archive = make_archive(sample)
    file = write_splits(archive, tmp_path / "data")["movie"]["test"]
    file.unlink()
    write_splits(archive, tmp_path / "data")
    assert file.exists()


def test_archive_without_a_domain(sample, make_archive, tmp_path):
    del sample["nyt"]
    with pytest.raises(StorageError, match="delete it and fetch again"):
        write_splits(make_archive(sample), tmp_path / "data")


def test_archive_that_is_none(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="delete it and fetch again"):
        write_splits(tmp_path / "x.tar.gz", tmp_path / "data")
