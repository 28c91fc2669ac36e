"""The pools that experiments run on: fetched, cut and fine-tuned once, and kept by content."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.papers.wordnet import PAIRS
from flows.config.campaign_file import Campaign
from flows.config.train_file import Partition
from flows.config.yaml_file import validate
from flows.directory.progress import Display
from flows.quickstart.quickstart import POOLS as QUICKSTART
from flows.quickstart.quickstart import make_campaign, task_settings
from flows.quickstart.sentiment import LABELS
from flows.quickstart.shipped_pool import ShippedPool
from flows.training.partition import write_parts
from merging.io.atomic import new_dir
from merging.optimization.fine_tuning import Lesson, save_start, train_together

TOGETHER = "all"
"""The model that was trained on all tasks."""
FIRST = "movie"
"""The domain that the base of `continued` was trained on."""
PARTS = Partition(task="sentiment", parts=8, concentration=0.5)
"""How the data of `parts` is cut."""


@dataclass(frozen=True)
class PaperPool:
    """A pool with what belongs to it.

    Args:
        name: Its name.
        seed: Of the members' training.
        campaign: Base, members and tasks.
        together: Task → the checkpoint with its head of the model that was trained on all tasks; empty where there is none.
        base_task: The task that the base itself was trained on, where there is one.
        place: Directory of the pool: statistics and single measurements are kept there.
    """

    name: str
    seed: int
    campaign: Campaign
    together: Mapping[str, str]
    base_task: str | None
    place: Path


def shipped(name: str, made: ShippedPool, *, together: bool) -> Callable[[Path, int, Display], PaperPool]:
    """A pool as those of the quick start: a member for each task, all from one base.

    Args:
        name: Its name.
        made: What it is.
        together: Whether a model is trained on all tasks, too.
    """

    def build(root: Path, seed: int, display: Display) -> PaperPool:
        place = root / name / f"seed-{seed}"
        base = made.base(root / "cache", display.say)
        files = made.data(root / "cache", root / name / "data", display.say)
        settings = made.training.model_copy(update={"seed": seed})
        lessons = {task: Lesson(task_settings(made, parts), made.labels.get(task, ())) for task, parts in files.items()}
        for task, lesson in lessons.items():
            train_together(base, {task: lesson}, place / "members" / task, settings, _told(display, task))
        found = {}
        if together:
            whole = train_together(base, lessons, place / "members" / TOGETHER, settings, _told(display, TOGETHER))
            found = {task: str(directory) for task, directory in whole.places.items()}
        campaign = make_campaign(made, name, place, base, files, None)
        return PaperPool(name, seed, campaign, found, None, place)

    return build


def continued(root: Path, seed: int, display: Display) -> PaperPool:
    """The sentiment pool once more, from a base that learnt movie reviews first, as GM's members do from IMDB.

    All have its head, which is merged. A member for each of the other domains; movie reviews stay a task of the merge.
    """
    whole = POOLS["sentiment"](root, seed, display)
    base = whole.campaign.members[FIRST].checkpoint
    place = root / "continued" / f"seed-{seed}"
    settings = QUICKSTART["sentiment"].training.model_copy(update={"seed": seed})
    members = [task for task in whole.campaign.tasks if task != FIRST]
    for task in members:
        lesson = Lesson(whole.campaign.tasks[task])
        train_together(base, {task: lesson}, place / "members" / task, settings, _told(display, task))
    given: dict[str, Any] = {
        "name": "continued",
        "base": base,
        "members": {task: {"checkpoint": str(place / "members" / task)} for task in members},
        "tasks": {name: task.model_dump(mode="json") for name, task in whole.campaign.tasks.items()},
        "task_heads": {FIRST: members[0]},
        "base_data": {"task": FIRST},
    }
    return PaperPool("continued", seed, validate(Campaign, given, "continued"), whole.together, FIRST, place)


def parts(root: Path, seed: int, display: Display) -> PaperPool:
    """Non-iid members of one data set (RM, appendix B): all domains as one, cut by Dirichlet shares of classes.

    All start from one head, which is merged. One task: the test splits of all domains.
    """
    whole = POOLS["sentiment"](root, seed, display)
    place, split_of = root / "parts" / f"seed-{seed}", dict[str, list[str]]()
    domains: list[Any] = list(whole.campaign.tasks.values())
    for split in ("train", "validation", "test"):
        split_of[split] = [file for task in domains for file in _files(task.data[split])]
    task = domains[0].model_copy(update={"data": split_of})
    base = place / "base"
    if not (base / "config.json").exists():
        with torch.random.fork_rng(devices=[]), new_dir(str(base)) as directory:
            torch.manual_seed(seed)
            save_start(whole.campaign.base, task, LABELS, directory)
    partition = PARTS.model_copy(update={"seed": seed})
    settings_of = write_parts(task, partition, place / "data")
    settings = QUICKSTART["sentiment"].training.model_copy(update={"seed": seed})
    for name, own in settings_of.items():
        train_together(base, {name: Lesson(own)}, place / "members" / name, settings, _told(display, name))
    given: dict[str, Any] = {
        "name": "parts",
        "base": str(base),
        "members": {
            name: {
                "checkpoint": str(place / "members" / name),
                "task": PARTS.task,
                "calibration": own.model_dump(mode="json"),
            }
            for name, own in settings_of.items()
        },
        "tasks": {PARTS.task: task.model_dump(mode="json")},
    }
    together = dict.fromkeys([PARTS.task], next(iter(whole.together.values()))) if whole.together else {}
    return PaperPool("parts", seed, validate(Campaign, given, "parts"), together, None, place)


def _files(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


POOLS: Mapping[str, Callable[[Path, int, Display], PaperPool]] = {
    "sentiment": shipped("sentiment", QUICKSTART["sentiment"], together=True),
    "continued": continued,
    "parts": parts,
    "tagging": shipped("tagging", QUICKSTART["tagging"], together=False),
    "pairs": shipped("pairs", PAIRS, together=False),
    "images": shipped("images", QUICKSTART["images"], together=False),
}
"""Name → what builds it below a directory, for a seed."""


def _told(display: Display, name: str) -> Callable[[int, int, float], None]:
    """Says every tenth of a training."""

    def tell(done: int, total: int, loss: float) -> None:
        if done % max(1, total // 10) == 0:
            display.say(f"  training {name}: step {done} of {total}, loss {loss:.2f}")

    return tell
