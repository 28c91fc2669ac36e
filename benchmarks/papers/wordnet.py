"""Four tasks on pairs of texts from WordNet, as in GLUE: inference, definition, usage and similarity, a number."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from flows.config.search_settings import WITH_DATA
from flows.quickstart.fetch import Progress, fetch, fetch_base, read_members
from flows.quickstart.language import WORDNET
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from merging.errors import StorageError
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import Split

SIZES: Mapping[Split, int] = {"train": 800, "validation": 120, "test": 200}
MOST = 2
"""Pairs of a synset, or of a word."""
MOST_WORDS = 24
"""Words of a definition or an example."""
WORDS = ("noun", "verb", "adj")
"""Files that examples are taken from."""
LABELS: Mapping[str, Sequence[str]] = {
    "inference": ("follows", "open", "excluded"),
    "definition": ("other", "right"),
    "usage": ("other", "right"),
    "similarity": ("similarity",),
}
FAR = 5
"""Steps between two nouns, over one that is above both, at which they have no similarity."""


@dataclass(frozen=True)
class Synset:
    """A meaning.

    Args:
        key: Its file and offset.
        words: Its lemmas, blanks between words.
        above: Keys of its hypernyms.
        below: Keys of its hyponyms.
        definition: What it means.
        examples: Sentences or phrases that use it.
    """

    key: str
    words: tuple[str, ...]
    above: tuple[str, ...]
    below: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two texts.

    Args:
        group: Pairs of one group stay in one split.
        text: The first.
        text_pair: The second.
        label: The class, or the number.
    """

    group: str
    text: str
    text_pair: str
    label: str | float


def synsets(raw: str, kind: str) -> dict[str, Synset]:
    """The meanings of a `data.<kind>`, by key, those with a short definition.

    Args:
        raw: Lines of offset, file, class, number of words in hexadecimal, words with ids, number of pointers, pointers of four
            columns, …, `|`, gloss; two blanks before each line of the licence.
        kind: `noun`, `verb` or `adj`.

    Raises:
        StorageError: A line has another form.
    """
    result = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        if line.startswith("  "):
            continue
        entry, _, gloss = line.partition(" | ")
        columns = entry.split()
        try:
            end = 4 + 2 * int(columns[3], 16)
            pointers = columns[end + 1 : end + 1 + 4 * int(columns[end])]
        except (IndexError, ValueError) as error:
            raise StorageError(f"line {number} of data.{kind} is no entry of WordNet: {line[:80]!r}") from error
        to: dict[str, list[str]] = {"@": [], "~": []}
        for symbol, offset in zip(pointers[::4], pointers[1::4], strict=True):
            to.get(symbol, []).append(f"{kind} {offset}")
        words = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in columns[4:end:2])
        definition = re.split(r'; "|;', gloss)[0].strip()
        examples = tuple(text for text in re.findall(r'"([^"]+)"', gloss) if len(text.split()) <= MOST_WORDS)
        if definition and len(definition.split()) <= MOST_WORDS:
            key = f"{kind} {columns[0]}"
            result[key] = Synset(key, words, tuple(to["@"]), tuple(to["~"]), definition, examples)
    return result


def inference(nouns: Mapping[str, Synset], generator: random.Random) -> Iterator[Pair]:
    """Whether a noun is a kind of another: of one above it, perhaps of one below it, not of one beside it."""
    for noun in nouns.values():
        above = [nouns[key] for key in noun.above if key in nouns]
        below = [nouns[key] for key in noun.below if key in nouns]
        beside = [nouns[key] for one in above for key in one.below if key in nouns and key != noun.key]
        if above and below and beside:
            for label, others in zip(LABELS["inference"], (above, below, beside), strict=True):
                other = generator.choice(others)
                yield Pair(noun.key, f"{noun.words[0]}: {noun.definition}", f"It is a kind of {other.words[0]}.", label)


def definition(nouns: Mapping[str, Synset], generator: random.Random) -> Iterator[Pair]:
    """Whether a definition is that of a word, or of another drawn at random."""
    order = list(nouns)
    for noun in nouns.values():
        other = nouns[generator.choice(order)]
        if other != noun:
            yield Pair(noun.key, noun.definition, other.words[0], "other")
            yield Pair(noun.key, noun.definition, noun.words[0], "right")


def usage(senses: Mapping[str, Sequence[Synset]], generator: random.Random) -> Iterator[Pair]:
    """Whether a word is used in the sense of a definition, or that is the definition of another word."""
    every = [(word, own) for word, meanings in senses.items() for own in meanings]
    for word, own in every:
        other, strange = generator.choice(every)
        for example in _using(word, own)[:1] if other != word else ():
            yield Pair(own.key, example, f"{word}: {strange.definition}", "other")
            yield Pair(own.key, example, f"{word}: {own.definition}", "right")


def similarity(nouns: Mapping[str, Synset], generator: random.Random) -> Iterator[Pair]:
    """How near a noun is to one some steps up and down from it: 1 less a fifth a step of the shortest way, at least 0."""
    order = list(nouns)
    for key in generator.sample(order, min(len(order), 4 * SIZES["train"])):
        end = key
        for up, steps in ((True, generator.randint(0, 3)), (False, generator.randint(0, 2))):
            for _ in range(steps):
                ways = [other for other in (nouns[end].above if up else nouns[end].below) if other in nouns]
                end = generator.choice(ways) if ways else end
        if end == key:
            end = generator.choice(order)
        one, other = _above(nouns, key), _above(nouns, end)
        steps = min((one[top] + other[top] for top in one.keys() & other.keys()), default=FAR)
        texts = [f"{nouns[place].words[0]}: {nouns[place].definition}" for place in (key, end)]
        if steps:
            yield Pair(key, *texts, max(0.0, 1 - steps / FAR))


def _above(nouns: Mapping[str, Synset], key: str) -> dict[str, int]:
    """What is above a noun, the noun itself included → in how many steps."""
    results, reached = {key: 0}, [key]
    for step in range(1, FAR):
        reached = [top for place in reached for top in nouns[place].above if top in nouns and top not in results]
        results |= dict.fromkeys(reached, step)
    return results


def frames(pairs: Sequence[Pair], sizes: Mapping[Split, int] = SIZES) -> dict[Split, pd.DataFrame]:
    """A task's splits with columns `text`, `text_pair` and `label`; at most `MOST` pairs of a group."""
    groups: dict[str, list[Pair]] = {}
    for pair in random.Random(0).sample(pairs, len(pairs)):
        group = groups.setdefault(pair.group, [])
        if len(group) < MOST:
            group.append(pair)
    return {
        name: pd.DataFrame([(p.text, p.text_pair, p.label) for p in part], columns=["text", "text_pair", "label"])
        for name, part in cut(groups, sizes).items()
    }


def _using(word: str, own: Synset) -> list[str]:
    """Examples of a meaning that have the word, or a form of it."""
    return [text for text in own.examples if any(part.lower().startswith(word[:4]) for part in text.split())]


def _frames(package: Path) -> dict[str, dict[Split, pd.DataFrame]]:
    files = read_members(package, [f"package/dict/data.{kind}" for kind in WORDS])
    of = {kind: synsets(files[f"package/dict/data.{kind}"].decode(), kind) for kind in WORDS}
    senses: dict[str, list[Synset]] = {}
    for kind in WORDS:
        for one in of[kind].values():
            for word in one.words:
                if word.isalpha() and word.islower() and len(word) > 2:
                    senses.setdefault(word, []).append(one)
    several = {word: own for word, own in senses.items() if len(own) > 1}
    make = {
        "inference": partial(inference, of["noun"]),
        "definition": partial(definition, of["noun"]),
        "usage": partial(usage, several),
        "similarity": partial(similarity, of["noun"]),
    }
    return {task: frames(list(make[task](random.Random(task)))) for task in LABELS}


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    package = fetch(WORDNET, cache, progress)
    key = ["pairs", list(LABELS), dict(SIZES), MOST, MOST_WORDS, list(WORDS), FAR]
    return written(directory, list(LABELS), key, lambda: _frames(package))


PAIRS = ShippedPool(
    about="MiniLM, and four tasks on pairs of texts from WordNet",
    base=fetch_base,
    data=_data,
    task={"kind": "text_classification", "text_pair": "text_pair", "max_length": 64},
    labels=LABELS,
    training=TrainingSettings(epochs=3),
    methods=WITH_DATA,
    candidates=24,
)
