"""What sentences of four genres are about, several topics at once: the Brown corpus, its nouns' topics from WordNet."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from flows.config.search_settings import WITH_DATA
from flows.quickstart.fetch import Progress, fetch, fetch_base, read_members
from flows.quickstart.language import WORDNET
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from flows.quickstart.tagging import BROWN, GENRES, parse, texts
from merging.errors import StorageError
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import Split

SIZES: Mapping[Split, int] = {"train": 640, "validation": 120, "test": 200}
UNSEEN: Mapping[str, str] = {"hobbies": "e", "letters": "g"}
"""Task without a member → the letters of its genres: skills and hobbies, biography and essays."""
TOPICS: Mapping[str, str] = {
    "04": "deeds", "06": "things", "07": "thoughts", "08": "people", "09": "thoughts", "10": "thoughts",
    "14": "people", "15": "things", "18": "people", "28": "deeds",
}  # fmt: skip
"""Number of a lexicographer's file of WordNet (acts, artifacts, attributes, …, time) → topic."""
LABELS = tuple(dict.fromkeys(TOPICS.values()))
PLURALS = (("ies", "y"), ("ses", "s"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("s", ""))
"""Endings of plural nouns and what they replace; the first whose noun WordNet has."""


def first_topics(index: str, data: str) -> dict[str, str]:
    """Noun → the topic of its most frequent sense, for nouns whose sense has one of `TOPICS`.

    Args:
        index: `index.noun`: lemma, part of speech, number of senses, number of pointer symbols, these, two counts, offsets of
            the senses, the most frequent first; blanks before each line of the licence.
        data: `data.noun`: offset, file, ….

    Raises:
        StorageError: A line has another form.
    """
    file_of = {line[:8]: line[9:11] for line in data.splitlines() if not line.startswith("  ")}
    result = {}
    for number, line in enumerate(index.splitlines(), start=1):
        if line.startswith("  "):
            continue
        columns = line.split()
        try:
            offset = columns[6 + int(columns[3])]
        except (IndexError, ValueError) as error:
            raise StorageError(f"line {number} of index.noun is no entry of WordNet: {line[:80]!r}") from error
        if (topic := TOPICS.get(file_of.get(offset, ""))) is not None:
            result[columns[0]] = topic
    return result


def topics_of(words: list[str], tags: list[str], known: Mapping[str, str]) -> list[str]:
    """The topics of a sentence's nouns, in the order of `LABELS`.

    Args:
        words: The sentence.
        tags: Coarse parts of speech.
        known: Noun → topic.
    """
    nouns = {word.lower() for word, tag in zip(words, tags, strict=True) if tag == "noun"}
    names = {topic for noun in nouns if (topic := known.get(_singular(noun, known))) is not None}
    return [topic for topic in LABELS if topic in names]


def _singular(noun: str, known: Mapping[str, str]) -> str:
    forms = [noun] + [noun.removesuffix(end) + start for end, start in PLURALS if noun.endswith(end)]
    return next((form for form in forms if form in known), noun)


def _frames(brown: Path, wordnet: Path) -> dict[str, dict[Split, pd.DataFrame]]:
    files = read_members(wordnet, ["package/dict/index.noun", "package/dict/data.noun"])
    known = first_topics(*(files[f"package/dict/{name}.noun"].decode() for name in ("index", "data")))
    tagged = texts(brown)
    frames = {}
    for genre, letters in {**GENRES, **UNSEEN}.items():
        groups = {
            name: [(" ".join(words), topics_of(words, tags, known)) for words, tags in parse(tagged[name])]
            for name in sorted(tagged)
            if name[1] in letters
        }
        parts = cut({name: [pair for pair in own if pair[1]] for name, own in groups.items()}, SIZES)
        frames[genre] = {name: pd.DataFrame(part, columns=["text", "label"]) for name, part in parts.items()}
    return frames


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    brown, wordnet = fetch(BROWN, cache, progress), fetch(WORDNET, cache, progress)
    genres = {**GENRES, **UNSEEN}
    key = ["topics", dict(SIZES), dict(TOPICS), genres]
    return written(directory, list(genres), key, lambda: _frames(brown, wordnet))


TOPICS_POOL = ShippedPool(
    about="MiniLM, and the topics of sentences in four genres of the Brown corpus, several at once",
    base=fetch_base,
    data=_data,
    task={
        "kind": "text_classification",
        "problem_type": "multi_label_classification",
        "labels": list(LABELS),
        "metric": "samples_f1",
        "max_length": 64,
    },
    labels=dict.fromkeys([*GENRES, *UNSEEN], LABELS),
    training=TrainingSettings(epochs=3),
    methods=WITH_DATA,
    candidates=24,
)
