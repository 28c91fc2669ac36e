"""The pools that experiments run on: fetched, cut and fine-tuned once, and kept by content."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.papers.topics import TOPICS_POOL, UNSEEN
from benchmarks.papers.wordnet import PAIRS
from flows.config.campaign_file import Campaign, load_campaign
from flows.config.train_file import Partition
from flows.config.yaml_file import validate
from flows.directory.progress import Display
from flows.quickstart.quickstart import POOLS as QUICKSTART
from flows.quickstart.quickstart import make_campaign, task_settings
from flows.quickstart.shipped_pool import ShippedPool
from flows.training.partition import write_parts
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import SettingsError
from merging.io import hashing
from merging.io.atomic import new_dir
from merging.optimization.fine_tuning import Lesson, save_start, train_together
from merging.tasks import AnyTaskSettings
from merging.tasks.task import SPLITS

TOGETHER = "all"
"""The model that was trained on all tasks."""
CONCENTRATION = 0.5
"""Of the Dirichlet shares of classes in members' parts."""
FIRST = "movie"
"""The domain that the base of `continued` was trained on."""
Together = Callable[[], Mapping[str, str]]
"""Trains one model on all tasks, unless that was done; task → the checkpoint with its head."""


@dataclass(frozen=True)
class PaperPool:
    """A pool with what belongs to it.

    Args:
        name: Its name.
        seed: Of the members' training.
        campaign: Base, members and tasks.
        together: Makes the model that is trained on all tasks; None where there is none.
        base_task: The task that the base itself was trained on, where there is one.
        place: Directory of the pool: statistics and single measurements are kept there.
    """

    name: str
    seed: int
    campaign: Campaign
    together: Together | None
    base_task: str | None
    place: Path


Build = Callable[[Path, int, Display], PaperPool]
"""Builds a pool below a directory, for a seed."""


def shipped(
    name: str, made: ShippedPool, *, together: bool, shared_head: bool = False, unseen: Sequence[str] = ()
) -> Build:
    """A pool as those of the quick start: a member for each task, all from one base.

    Args:
        name: Its name.
        made: What it is.
        together: Whether a model is trained on all tasks, too.
        shared_head: Whether all start from one head, which is merged; else each has its own.
        unseen: Tasks that no member is trained on.
    """

    def build(root: Path, seed: int, display: Display) -> PaperPool:
        place = root / name / f"seed-{seed}"
        base = made.base(root / "cache", display.say)
        files = made.data(root / "cache", root / name / "data", display.say)
        settings = made.training.model_copy(update={"seed": seed})
        others = {task: task_settings(made, files.pop(task)).model_copy(update={"role": "unseen"}) for task in unseen}
        lessons = {task: Lesson(task_settings(made, parts), made.labels.get(task, ())) for task, parts in files.items()}
        if shared_head:
            first = next(iter(lessons.values()))
            base = _with_head(base, first.settings, first.labels, seed, place)
            lessons = {task: Lesson(lesson.settings) for task, lesson in lessons.items()}
        for task, lesson in lessons.items():
            train_together(base, {task: lesson}, place / "members" / task, settings, _told(display, task))

        def train() -> Mapping[str, str]:
            whole = train_together(base, lessons, place / "members" / TOGETHER, settings, _told(display, TOGETHER))
            return {task: str(directory) for task, directory in whole.places.items()}

        campaign = make_campaign(made, name, place, base, files, None)
        campaign = campaign.model_copy(update={"tasks": {**campaign.tasks, **others}})
        return PaperPool(name, seed, campaign, train if together else None, None, place)

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


def parts(pool: str, made: ShippedPool, name: str, count: int, unseen: Sequence[str] = ()) -> Build:
    """Non-iid members of one data set (RM, appendix B): all domains of a pool as one, cut by Dirichlet shares of classes.

    All start from one head, which is merged. One task: the test splits of all domains.

    Args:
        pool: Of `POOLS`; all its tasks have the same classes.
        made: What it is.
        name: Of what is built.
        count: How many members.
        unseen: Tasks that are left out.
    """

    def build(root: Path, seed: int, display: Display) -> PaperPool:
        files = made.data(root / "cache", root / pool / "data", display.say)
        files = {task: own for task, own in files.items() if task not in unseen}
        place = root / name / f"seed-{seed}"
        domains: list[Any] = [task_settings(made, own) for own in files.values()]
        split_of = {split: [str(file) for task in domains for file in _files(task.data[split])] for split in SPLITS}
        task = domains[0].model_copy(update={"data": split_of})
        base = _with_head(made.base(root / "cache", display.say), task, made.labels[next(iter(files))], seed, place)
        settings_of = write_parts(
            task, Partition(task=pool, parts=count, concentration=CONCENTRATION, seed=seed), place / "data"
        )
        settings = made.training.model_copy(update={"seed": seed})
        for member, own in settings_of.items():
            train_together(base, {member: Lesson(own)}, place / "members" / member, settings, _told(display, member))
        members = {
            member: {
                "checkpoint": str(place / "members" / member),
                "task": pool,
                "calibration": own.model_dump(mode="json"),
            }
            for member, own in settings_of.items()
        }
        given = {"name": name, "base": str(base), "members": members, "tasks": {pool: task.model_dump(mode="json")}}
        campaign = validate(Campaign, given, name)
        return PaperPool(name, seed, campaign, lambda: _as_one(POOLS[pool](root, seed, display), pool), None, place)

    return build


def of_campaign(path: str, root: Path) -> PaperPool:
    """A campaign's own members and tasks as a pool.

    Args:
        path: The campaign file.
        root: Gets a directory of the campaign's name, for statistics and measurements.

    Raises:
        SettingsError: The file is wrong, or a member has no task.
    """
    campaign = load_campaign(path)
    if without := [member for member in campaign.members if campaign.task_of(member) is None]:
        raise SettingsError(f"{path}: members.{without[0]} has no task, which the experiments measure it on")
    return PaperPool(campaign.name, 0, campaign, None, campaign.base_data.task, root / campaign.name)


def _as_one(pool: PaperPool, task: str) -> Mapping[str, str]:
    """The model of all tasks of a pool as that of one task."""
    assert pool.together is not None
    return {task: next(iter(pool.together().values()))}


def _with_head(base: Path, task: AnyTaskSettings, labels: Sequence[str], seed: int, place: Path) -> Path:
    """The base with a head that members start from, made below a directory unless the same is there."""
    settings = task.model_dump(mode="json", exclude={"data"})
    key = hashing.fingerprint([Checkpoint.open(str(base)).fingerprint, settings, list(labels), seed])
    out = place / f"base-{key}"
    if not (out / "config.json").exists():
        with torch.random.fork_rng(devices=[]), new_dir(str(out)) as directory:
            torch.manual_seed(seed)
            save_start(base, task, labels, directory)
    return out


def _files(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


POOLS: Mapping[str, Build] = {
    "sentiment": shipped("sentiment", QUICKSTART["sentiment"], together=True),
    "continued": continued,
    "parts": parts("sentiment", QUICKSTART["sentiment"], "parts", 8),
    "topics": shipped("topics", TOPICS_POOL, together=True, shared_head=True, unseen=list(UNSEEN)),
    "topic-parts": parts("topics", TOPICS_POOL, "topic-parts", 6, list(UNSEEN)),
    "tagging": shipped("tagging", QUICKSTART["tagging"], together=False),
    "pairs": shipped("pairs", PAIRS, together=False),
    "seq2seq": shipped("seq2seq", QUICKSTART["seq2seq"], together=False),
    "images": shipped("images", QUICKSTART["images"], together=False),
}
"""Name → what builds it below a directory, for a seed."""


def _told(display: Display, name: str) -> Callable[[int, int, float], None]:
    """Says every tenth of a training."""

    def tell(done: int, total: int, loss: float) -> None:
        if done % max(1, total // 10) == 0:
            display.say(f"  training {name}: step {done} of {total}, loss {loss:.2f}")

    return tell
