"""Rated sentences of four domains, in splits that share no review and no sentence, and a sentence encoder."""

import html
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pandas as pd

from flows.config.search_settings import WITH_DATA
from flows.quickstart.fetch import VADER, Progress, fetch, fetch_base
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from merging.errors import StorageError
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import Split

LABELS = ("negative", "neutral", "positive")
DOMAINS: Mapping[str, str] = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL, CLEAR = 0.4, 0.6
"""A mean rating (−4 … 4) within ±0.4 is neutral, beyond ±0.6 it is clear; sentences between are dropped."""


@dataclass(frozen=True)
class Sentence:
    """A rated sentence.

    Args:
        group: The review or editorial that it comes from; sentences of one group stay in one split.
        text: What it says.
        label: Index into `LABELS`.
    """

    group: str
    text: str
    label: int


@dataclass(frozen=True)
class SplitSettings:
    """How sentences are cut into splits.

    Args:
        sizes: At most this many examples a split; groups are taken whole, so that the last one may be cut.
        seed: Of the order of groups.
    """

    sizes: Mapping[Split, int] = field(default_factory=lambda: {"train": 1600, "validation": 200, "test": 500})
    seed: int = 0


def parse(raw: str) -> list[Sentence]:
    """The sentences of a `*_GroundTruth.txt`, first come of those that say the same, unclear ones left out.

    Args:
        raw: Lines of id ⇥ mean rating ⇥ text; of ids with `_`, what stands before it names the group.

    Raises:
        StorageError: A line has another form.
    """
    sentences = []
    seen = set()
    for number, line in enumerate(raw.rstrip().split("\n"), start=1):
        try:
            identity, rating, text = line.split("\t")
            label = _label(float(rating))
        except ValueError as error:
            raise StorageError(f"line {number} is not id ⇥ rating ⇥ text: {line[:80]!r}") from error
        text = html.unescape(text).strip()
        normalised = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
        if label is None or not normalised or normalised in seen:
            continue
        seen.add(normalised)
        sentences.append(Sentence(identity.split("_")[0], text, label))
    return sentences


def split(sentences: list[Sentence], settings: SplitSettings) -> dict[Split, list[Sentence]]:
    """Cuts sentences into splits, whole groups at a time; test and validation are filled first."""
    groups: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        groups.setdefault(sentence.group, []).append(sentence)
    return cut(groups, settings.sizes, settings.seed)


def write_splits(archive: Path, directory: Path, settings: SplitSettings | None = None) -> Files:
    """Writes each domain's splits as Parquet files with columns `text` and `label`, unless they are there.

    Args:
        archive: The source distribution of vaderSentiment.
        directory: Gets `<domain>/<split>.parquet`.
        settings: How to cut.

    Returns:
        Domain → split → file.

    Raises:
        StorageError: The archive lacks a file, or there is no right or no space to write.
    """
    settings = settings or SplitSettings()
    key = [dict(settings.sizes), settings.seed, NEUTRAL, CLEAR]
    return written(directory, list(DOMAINS), key, lambda: _frames(archive, settings))


def _frames(archive: Path, settings: SplitSettings) -> dict[str, dict[Split, pd.DataFrame]]:
    return {
        domain: {
            name: pd.DataFrame({"text": [s.text for s in part], "label": [s.label for s in part]})
            for name, part in split(parse(raw), settings).items()
        }
        for domain, raw in _read_archive(archive).items()
    }


def _label(rating: float) -> int | None:
    if abs(rating) <= NEUTRAL:
        return 1
    if abs(rating) >= CLEAR:
        return 0 if rating < 0 else 2
    return None


def _read_archive(archive: Path) -> dict[str, str]:
    """Each domain's ratings out of the archive within the source distribution."""
    try:
        with tarfile.open(archive) as outer:
            inner = next(name for name in outer.getnames() if name.endswith(INNER))
            member = outer.extractfile(inner)
            packed = member.read() if member else b""
        texts = {}
        with tarfile.open(fileobj=BytesIO(packed)) as ratings:
            for domain, name in DOMAINS.items():
                file = ratings.extractfile(f"hutto_ICWSM_2014/{name}")
                texts[domain] = file.read().decode() if file else ""
    except (tarfile.TarError, OSError, StopIteration, KeyError) as error:
        raise StorageError(
            f"{archive} does not hold {INNER} as expected ({error!r}): delete it and fetch again"
        ) from error
    return texts


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    return write_splits(fetch(VADER, cache, progress), directory)


SENTIMENT = ShippedPool(
    about="MiniLM, and the sentiment of four domains",
    base=fetch_base,
    data=_data,
    task={"kind": "text_classification", "max_length": 64},
    labels=dict.fromkeys(DOMAINS, LABELS),
    training=TrainingSettings(),
    methods=WITH_DATA,
    candidates=24,
    statistics={
        "fisher": {"examples": 128},
        "representation": {"examples": 64},
        "propagated": {"examples": 160},
    },
    distil={"steps": 160},
)
"""Nine sentences in ten are shorter than 64 tokens."""
