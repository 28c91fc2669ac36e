"""The pools that experiments run on: fetched, cut and fine-tuned once, and kept by content."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.config.campaign_file import Campaign, load_campaign
from flows.config.train_file import TrainFile
from flows.config.yaml_file import validate
from flows.directory.progress import Display
from flows.quickstart.quickstart import POOLS as QUICKSTART
from flows.quickstart.quickstart import make_campaign, train_members
from flows.training.train import train
from merging.optimization.fine_tuning import TrainingSettings

TOGETHER = "all"
"""The model that was trained on all tasks."""


@dataclass(frozen=True)
class PaperPool:
    """A pool with what belongs to it.

    Args:
        name: Its name.
        seed: Of the members' training.
        campaign: Base, members and tasks.
        together: The checkpoint that was trained on all tasks, where there is one.
        base_task: The task that the base itself was trained on, where there is one.
        place: Directory of the pool: statistics and results of single evaluations are kept there.
    """

    name: str
    seed: int
    campaign: Campaign
    together: str | None
    base_task: str | None
    place: Path


def sentiment(root: Path, seed: int, display: Display) -> PaperPool:
    """Four domains of sentiment; the base gets one head first, which all members share (RM's shared heads)."""
    tasks, base = _domains(root, display)
    return _trained("sentiment", base, tasks, seed, root, display, shared_head=True, together=TOGETHER)


def continued(root: Path, seed: int, display: Display) -> PaperPool:
    """The base is trained on movie reviews first, then a member on each other domain (GM's IMDB and what follows)."""
    tasks, base = _domains(root, display)
    first = _trained("continued/base", base, {"movie": tasks["movie"]}, seed, root, display)
    own = first.campaign.members["movie"].checkpoint
    rest = {name: task for name, task in tasks.items() if name != "movie"}
    pool = _trained("continued", own, rest, seed, root, display, together=TOGETHER)
    settings = pool.campaign.model_dump(mode="json")
    settings["tasks"]["movie"], settings["task_heads"] = tasks["movie"], {"movie": next(iter(rest))}
    settings["base_data"] = {"task": "movie"}
    return PaperPool("continued", seed, validate(Campaign, settings, "continued"), pool.together, "movie", pool.place)


def _quickstart(name: str) -> Callable[[Path, int, Display], PaperPool]:
    """A pool of the quick start, whose members have heads of their own; the seed is the quick start's."""

    def build(root: Path, seed: int, display: Display) -> PaperPool:
        made, place = QUICKSTART[name], root / name
        base = made.base(root / "cache", display.say)
        files = made.data(root / "cache", place / "data", display.say)
        train_members(made, base, files, place / "members", display)
        return PaperPool(name, seed, make_campaign(made, name, place, base, files, None), None, None, place)

    return build


POOLS: Mapping[str, Callable[[Path, int, Display], PaperPool]] = {
    "sentiment": sentiment,
    "continued": continued,
    "tagging": _quickstart("tagging"),
    "images": _quickstart("images"),
}


def _domains(root: Path, display: Display) -> tuple[dict[str, dict[str, Any]], str]:
    """The quick start's tasks, and its base."""
    pool = QUICKSTART["sentiment"]
    base = pool.base(root / "cache", display.say)
    files = pool.data(root / "cache", root / "domains", display.say)
    tasks = {
        name: {**pool.task, "data": {str(split): str(file) for split, file in parts.items()}}
        for name, parts in files.items()
    }
    return tasks, str(base)


def _trained(
    name: str,
    base: str,
    tasks: Mapping[str, Mapping[str, Any]],
    seed: int,
    root: Path,
    display: Display,
    **more: Any,
) -> PaperPool:
    """A pool as `mergequest train` makes it."""
    place = root / name / f"seed-{seed}"
    labels = dict.fromkeys(tasks, ("negative", "neutral", "positive"))
    file = {
        "base": base,
        "out": str(place / "members"),
        "tasks": dict(tasks),
        "labels": labels,
        "training": TrainingSettings(seed=seed).model_dump(),
        **more,
    }
    made = train(validate(TrainFile, file, name), display)
    campaign = load_campaign(made[-1])
    together = str(place / "members" / TOGETHER) if TOGETHER in more.values() else None
    return PaperPool(name, seed, campaign, together, None, place)


def subset(campaign: Campaign, members: Sequence[str]) -> list[str]:
    """The tasks of some members."""
    return [task for member in members if (task := campaign.task_of(member)) is not None]
