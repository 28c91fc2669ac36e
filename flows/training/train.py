"""`mergequest train`: fine-tunes the members of a pool, one a core, and keeps what is there already."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from flows.config.campaign_file import Campaign
from flows.config.train_file import TrainFile
from flows.directory.progress import Display
from flows.training.partition import write_parts
from merging.checkpoints.checkpoint import CONFIG
from merging.errors import SettingsError, StorageError
from merging.io import addresses, atomic, documents, hashing, storage
from merging.optimization.fine_tuning import Lesson, Trained, TrainingSettings, has_answers, save_start, train_together
from merging.tasks import TASKS, AnyTaskSettings
from ray_tasks.connect import connect
from ray_tasks.jobs.parallel import each

BASE = "base"
"""The base with the head that all members share, beside the members."""
MEMBERS = "campaign.yaml"
"""A campaign file of the members, beside them."""


@dataclass(frozen=True)
class Course:
    """One model to fine-tune.

    Args:
        base: The checkpoint to start from.
        lessons: Task → what is trained on.
        out: Local directory to make.
    """

    base: str
    lessons: Mapping[str, Lesson]
    out: Path


def train(file: TrainFile, display: Display) -> list[str]:
    """Fine-tunes a member on every task of a train file, unless they are there.

    Members that were finished before an interruption are used again; what they were trained from is in their `training.json`.

    Args:
        file: Base, tasks and settings.
        display: Shows progress.

    Returns:
        The directories of the members and of the model trained on all tasks, and a campaign file of the members.

    Raises:
        MergequestError: Something is unusable, found before any training where it can be.
    """
    out = addresses.local_path(file.out)
    tasks: dict[str, AnyTaskSettings] = dict(file.tasks)
    parts: dict[str, AnyTaskSettings] = {}
    if file.partition is not None:
        parts = write_parts(tasks[file.partition.task], file.partition, out / "data")
        del tasks[file.partition.task]
    labels = {name: _labels(file, name, task) for name, task in file.tasks.items()}
    base = file.base
    if file.shared_head:
        base = _base_with_head(file, labels, out / BASE)
    if file.shared_head:
        labels = dict.fromkeys(labels, ())
    lessons = {name: Lesson(task, labels[name]) for name, task in tasks.items()}
    if file.partition is not None:
        lessons |= {name: Lesson(task, labels[file.partition.task]) for name, task in parts.items()}
    courses = {name: Course(base, {name: lesson}, out / name) for name, lesson in lessons.items()}
    if file.together is not None:
        whole = {name: Lesson(task, labels[name]) for name, task in file.tasks.items()}
        courses[file.together] = Course(base, whole, out / file.together)
    made = run_courses(courses, file.training, file.threads, display)
    places = [str(path) for trained in made.values() for path in dict.fromkeys(trained.places.values())]
    return [*places, _write_campaign(file, base, [*tasks], parts, out)]


def train_missing(campaign: Campaign, settings: TrainingSettings, together: str | None, display: Display) -> list[str]:
    """Fine-tunes the members of a campaign whose checkpoints are not there, each on its own task, or on its part of it.

    Args:
        campaign: The campaign.
        settings: How to train.
        together: Also train one model on all tasks, under this name beside the members; None for none.
        display: Shows progress.

    Returns:
        The directories that were made.

    Raises:
        SettingsError: A member that is missing has no task, or that of another one, or lies at a remote address; or it is not
            clear whether it is to be trained on its task or on its calibration data.
        MergequestError: Something else is unusable.
    """
    courses: dict[str, Course] = {}
    places, first_of = [], dict[Any, str]()
    for name, member in campaign.members.items():
        if storage.exists(addresses.join(member.checkpoint, CONFIG)):
            continue  # nothing that is there is trained over, whoever made it
        task = campaign.task_of(name)
        if task is None:
            raise SettingsError(
                f"members.{name}: {member.checkpoint} is not there, and no task says what to train it on"
            )
        if not addresses.is_local(member.checkpoint):
            raise SettingsError(
                f"members.{name}: {member.checkpoint} is remote; train into a local directory and copy it"
            )
        own = _own_lesson(campaign, name, task)
        if (twin := first_of.setdefault((task, *own.files), name)) != name:
            raise SettingsError(
                f"members.{name}: it would be trained on the data of '{twin}', to the same weights: give it a task of its own, "
                "or train parts of one data set by a train file with `partition`"
            )
        place = addresses.local_path(member.checkpoint)
        places.append(place)
        courses[name] = Course(campaign.base, {task: own}, place)
    if together is not None:
        if together in campaign.members:
            raise SettingsError(f"--together: '{together}' is a member's name")
        seen = {name: task for name, task in campaign.tasks.items() if name not in campaign.unseen()}
        whole = {name: lesson(campaign.base, task) for name, task in seen.items()}
        first = addresses.local_path(next(iter(campaign.members.values())).checkpoint)
        courses[together] = Course(campaign.base, whole, (places[0] if places else first).parent / together)
    if not courses:
        display.say("every member's checkpoint is there: nothing to train")
        return []
    made = run_courses(courses, settings, campaign.resources.threads, display)
    return [str(path) for trained in made.values() for path in dict.fromkeys(trained.places.values())]


def run_courses(
    courses: Mapping[str, Course], settings: TrainingSettings, threads: int, display: Display
) -> dict[str, Trained]:
    """Fine-tunes models, one a core, unless they are there.

    Raises:
        MergequestError: See `train_together`.
    """
    calls = {name: (course, settings) for name, course in courses.items()}
    trained_of: dict[str, Trained] = {}
    title = f"Training: {len(calls)} model{'s' * (len(calls) > 1)}"
    with connect(), display.phase(title), display.bar("percent", 100) as bar:
        for name, trained in each(_train, calls, cpus=threads, progress=lambda share: bar.reach(int(100 * share))):
            how = "there already" if trained.reused else f"{trained.seconds:.0f} s, training loss {trained.loss:.3f}"
            display.say(f"  {name}: {how}")
            trained_of[name] = trained
    return {name: trained_of[name] for name in courses}


def lesson(base: str, task: AnyTaskSettings) -> Lesson:
    """A task with the classes of its data, or with none where the base's own head has them already."""
    kind: Any = TASKS[task.kind][0]
    classes = kind.data_classes(task)
    known = _classes_of(base, kind)
    numbered = all(name.isdecimal() for name in classes) and len(classes) <= len(known)
    return Lesson(task, () if numbered or set(classes) <= set(known) else classes)


def _own_lesson(campaign: Campaign, name: str, task: str) -> Lesson:
    """What a member is trained on: its task, or its part of it where members of one task have examples of their own.

    Raises:
        SettingsError: Its calibration data have labels, as a part has, but no other member has its task.
    """
    whole, own = lesson(campaign.base, campaign.tasks[task]), campaign.members[name].calibration
    if own is None or own.kind != whole.settings.kind or not has_answers(own):
        return whole  # examples for statistics
    part = Lesson(own, whole.labels)
    if part.files == whole.files:
        return whole
    if sum(campaign.task_of(other) == task for other in campaign.members) > 1:
        return part
    raise SettingsError(
        f"members.{name}: it is not there, and could be trained on all examples of '{task}' or on its calibration data, which "
        "have labels: set the calibration's `label` (or `completion`) to null, or give it a task of its own on those data"
    )


def _train(course: Course, settings: TrainingSettings, report: Callable[[float], None]) -> Trained:
    return train_together(
        course.base, course.lessons, course.out, settings, lambda done, total, loss: report(done / total)
    )


def _labels(file: TrainFile, name: str, task: AnyTaskSettings) -> tuple[str, ...]:
    """Classes of a task's head; none where the base's own is trained on."""
    if name in file.own_head:
        return ()
    return tuple(file.labels.get(name) or lesson(file.base, task).labels)


def _classes_of(base: str, kind: Any) -> list[str]:
    """The classes of the base's own head for this kind of task; empty where it has none."""
    try:
        config = documents.read_object(addresses.join(base, CONFIG))
    except StorageError:
        return []
    suffix, names = kind.model_class.removeprefix("AutoModel"), config.get("id2label")
    if not isinstance(names, dict) or not str((config.get("architectures") or [""])[0]).endswith(suffix):
        return []
    return [str(names[key]) for key in sorted(names, key=int)]


def _base_with_head(file: TrainFile, labels: Mapping[str, tuple[str, ...]], out: Path) -> str:
    """The base with a new head that all members start from and share, made unless it is there."""
    if len(set(labels.values())) > 1:
        first, other = list(dict.fromkeys(labels.values()))[:2]
        raise SettingsError(
            f"shared_head: tasks have different classes ({', '.join(first)}; {', '.join(other)}): give them the same `labels`"
        )
    (classes,) = set(labels.values())
    if not classes:
        return file.base  # it has one already
    task = next(iter(file.tasks.values()))
    key = hashing.fingerprint([file.base, task.kind, list(classes), file.training.seed])
    record = out / "training.json"
    if record.exists() and documents.read_object(str(record)).get("key") == key:
        return str(out)
    with torch.random.fork_rng(devices=[]), atomic.new_dir(str(out)) as directory:
        torch.manual_seed(file.training.seed)
        save_start(file.base, task, classes, directory)
        atomic.write_json(str(directory / "training.json"), {"key": key})
    return str(out)


def _write_campaign(
    file: TrainFile, base: str, members: list[str], parts: Mapping[str, AnyTaskSettings], out: Path
) -> str:
    """A campaign file of the members; one that is there is left as it is."""
    path = out / MEMBERS
    if path.exists():
        return str(path)
    tasks = {name: task.model_dump(mode="json", exclude_defaults=True) for name, task in file.tasks.items()}
    pool: dict[str, Any] = {name: {"checkpoint": str(out / name)} for name in members}
    for name, part in parts.items():
        assert file.partition is not None
        own = {"kind": part.kind, **part.model_dump(mode="json", exclude_defaults=True)}
        pool[name] = {"checkpoint": str(out / name), "task": file.partition.task, "calibration": own}
    settings = {
        "name": out.name,
        "base": base,
        "members": pool,
        "tasks": {name: {"kind": file.tasks[name].kind, **task} for name, task in tasks.items()},
    }
    atomic.write_text(str(path), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110))
    return str(path)
