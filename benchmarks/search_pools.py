"""The two pools that `search_comparison.py` searches: the quick start's, and one of unlike tasks with heads of their own.

The second is made from the quick start's texts and base alone: all-MiniLM cut to its first layers, fine-tuned to tell a
sentence's source, to tell its sentiment, to tell whether its words were moved, and to guess a word that was taken out.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from flows.config.campaign_file import load_campaign
from flows.quickstart.sentiment import LABELS
from merging.checkpoints.pool import Pool
from merging.io import atomic, storage
from merging.mergers.material import Material, open_statistics, subset_fingerprint
from merging.optimization.fine_tuning import TrainingSettings, train_member
from merging.propagation import PropagationSettings, propagate
from merging.statistics import STATISTICS, Partial, measure, save, save_tensors
from merging.tasks import make_task
from merging.tasks.task import SPLITS, Task
from merging.tasks.text_classification import TextClassificationSettings

STATISTIC_EXAMPLES = {"fisher": 96, "gram": 128}
"""Unlabelled training examples of each member behind a statistic."""
ALIKE, UNLIKE = 160, 400
"""The same behind RegMean propagated, of members that are alike (as the quick start has it) and of unlike ones."""
CLOZE = ("the", "of", "and")
MOVED = ("as written", "two swapped", "shuffled")


@dataclass(frozen=True)
class Opened:
    """A pool with everything that its methods ask for.

    Args:
        name: Of the pool.
        material: Pool and statistics.
        tasks: One a member, with its name and its head.
        statistic_examples: Statistic → training examples that were run through models to compute it, all members.
    """

    name: str
    material: Material
    tasks: list[Task]
    statistic_examples: Mapping[str, int]

    @property
    def members(self) -> list[str]:
        """All members, each the owner of the task of its name."""
        return sorted(self.material.pool.members)


def quickstart_pool(campaign: str, place: Path, sizes: Mapping[str, int], tokens: int) -> Opened:
    """The quick start's members on the first examples of its validation and test splits.

    Args:
        campaign: Directory of a quick start.
        place: Where cut data and statistics are kept.
        sizes: Split → examples of each task.
        tokens: What texts are cut to.
    """
    settings = load_campaign(str(Path(campaign) / "campaign.yaml"))
    data = {}
    for name, task in settings.tasks.items():
        data[name] = {}
        for split, file in task.data.items():
            frame = pd.read_parquet(file).sample(frac=1.0, random_state=0)[: sizes[split]]
            data[name][split] = _written(frame, place / "data" / name / f"{split}.parquet")
    members = {name: member.checkpoint for name, member in settings.members.items()}
    result = Path(campaign) / "statistics"
    return _opened("quick start", settings.base, members, data, place, tokens, ALIKE, result)


def unlike_pool(campaign: str, place: Path, sizes: Mapping[str, int], tokens: int, layers: int) -> Opened:
    """Members of four unlike tasks, fine-tuned here from the first layers of the quick start's base.

    Args:
        campaign: Directory of a quick start, for its base and its texts.
        place: Where base, members, data and statistics are kept.
        sizes: Split → examples of each task.
        tokens: What texts are cut to.
        layers: How many layers the base keeps.
    """
    settings = load_campaign(str(Path(campaign) / "campaign.yaml"))
    base = _cut(settings.base, place / "base", layers)
    data: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        texts = pd.concat(
            [pd.read_parquet(task.data[split]).assign(source=name) for name, task in settings.tasks.items()]
        )
        for number, (name, frame) in enumerate(_unlike(texts, random.Random(split)).items()):
            frame = frame.sample(frac=1.0, random_state=number)[: sizes[split]]
            data.setdefault(name, {})[split] = _written(frame, place / "data" / name / f"{split}.parquet")
    training = TrainingSettings(epochs=3)
    members = {name: place / "members" / name for name in data}
    for name, out in members.items():
        task = TextClassificationSettings(data={"train": data[name]["train"]}, max_length=tokens)
        train_member(base, task, out, training, labels=LABELS)
    return _opened(
        "unlike tasks", str(base), {name: str(out) for name, out in members.items()}, data, place, tokens, UNLIKE
    )


def _unlike(texts: pd.DataFrame, generator: random.Random) -> dict[str, pd.DataFrame]:
    """Four tasks of three classes from sentences with a sentiment and a source."""
    sources = ("movie", "nyt", "tweets")
    chosen = texts[texts["source"].isin(sources)]
    moved, cloze = [], []
    for text in texts["text"]:
        words = text.split()
        if len(words) >= 6:
            label = generator.randrange(len(MOVED))
            moved.append((_moved(words[:16], label, generator), label))
        places = [number for number, word in enumerate(words[:14]) if word in CLOZE]
        if places:
            taken = generator.choice(places)
            cloze.append((" ".join([*words[:taken], "[MASK]", *words[taken + 1 :]]), CLOZE.index(words[taken])))
    return {
        "source": pd.DataFrame({"text": chosen["text"], "label": chosen["source"].map(sources.index)}),
        "sentiment": texts.loc[texts["source"].isin(("amazon", "tweets")), ["text", "label"]],
        "order": pd.DataFrame(moved, columns=["text", "label"]),
        "cloze": pd.DataFrame(cloze, columns=["text", "label"]).groupby("label").head(600),
    }


def _moved(words: list[str], label: int, generator: random.Random) -> str:
    """The words as they are, with two far apart swapped, or in any order."""
    words = list(words)
    if label == 1:
        first = generator.randrange(1, len(words) // 2)
        second = generator.randrange(len(words) // 2 + 1, len(words))
        words[first], words[second] = words[second], words[first]
    if label == 2:
        generator.shuffle(words)
    return " ".join(words)


def _cut(base: str, out: Path, layers: int) -> Path:
    """The first layers of a base model, as a checkpoint."""
    if not (out / "config.json").exists():
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(base, num_hidden_layers=layers, dtype=torch.float32, local_files_only=True)
        with atomic.new_dir(str(out)) as directory:
            model.save_pretrained(directory)
            AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(directory)
    return out


def _written(frame: pd.DataFrame, path: Path) -> str:
    atomic.write_bytes(str(path), frame.reset_index(drop=True).to_parquet(index=False))
    return str(path)


def _opened(
    name: str,
    base: str,
    members: Mapping[str, str],
    data: Mapping[str, Mapping[str, str]],
    place: Path,
    tokens: int,
    propagated: int,
    result: Path | None = None,
) -> Opened:
    """The pool with its statistics, computed unless they are there, or among those that were found elsewhere."""
    pool = Pool.open(base, members, ())
    settings = {task: TextClassificationSettings(data=dict(files), max_length=tokens) for task, files in data.items()}
    tasks = {task: make_task(task, own, members[task]) for task, own in settings.items()}
    files: dict[str, tuple[str, ...]] = {}
    for kind in ("fisher", "gram"):
        statistic = STATISTICS[kind](STATISTICS[kind].settings_type(examples=STATISTIC_EXAMPLES[kind]))
        for member, task in tasks.items():
            there = sorted(result.glob(f"{member}.{kind}.*.safetensors")) if result else []
            path = str(there[-1]) if there else str(place / "statistics" / f"{member}.{kind}.safetensors")
            if not storage.exists(path):
                checkpoint = pool.members[member].checkpoint.fingerprint
                computed = measure(task, statistic)
                save(path, statistic, computed, checkpoint=checkpoint, data=task.data_fingerprint("train"))
            files[member] = (*files.get(member, ()), path)
    everyone, path = sorted(members), str(place / "statistics" / "pool.propagated.safetensors")
    if not storage.exists(path):
        chosen = PropagationSettings(examples=propagated)
        weights = propagate(pool, tasks, everyone, chosen).weights
        about = Partial(counts={"examples": chosen.examples * len(members)})
        fingerprint = subset_fingerprint(pool, everyone)
        save_tensors(path, "propagated", chosen.model_dump(), weights, about, checkpoint=fingerprint, data="")
    files["+".join(everyone)] = (path,)
    examples = {member: task.size("train") for member, task in tasks.items()}
    statistics = open_statistics(pool, files)
    counts = {kind: sum(file.examples for file in own.values()) for kind, own in statistics.items()}
    return Opened(name, Material(pool, statistics, examples), list(tasks.values()), counts)
