"""What merges are compared with beside base and members: an ensemble, a model of all data, a merge trained on the labels."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flows.campaign.open_campaign import Files, OpenCampaign
from flows.config.sections import Baseline
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Bar, Display
from flows.report.test_answers import KeptPredictions
from flows.training.train import Course, lesson, run_courses
from merging.errors import SettingsError
from merging.evaluation.steps import Trace
from merging.io import addresses
from merging.optimization.fine_tuning import Lesson
from merging.recipe import Recipe
from merging.tasks.task import Split
from ray_tasks.jobs import baselines as jobs
from ray_tasks.jobs.parallel import each
from ray_tasks.jobs.statistics import BoundTask
from search.candidate import Candidate, Measurement, Outcome, Provenance, make_row
from search.ledger.ledger import Ledger
from search.ledger.row import Row

ALL_DATA = "baselines/all_data"
"""Where the model that was trained on all tasks lies in a campaign's directory."""


def require_baselines(opened: OpenCampaign) -> None:
    """Looks whether the baselines can be made and measured; computes nothing.

    Raises:
        SettingsError: A task gives no logits, is judged by what models generate, or has no data to train on.
    """
    unseen = opened.campaign.unseen()
    for name in opened.campaign.baselines:
        for task_name, task in opened.tasks.items():
            if not task.has_logits:
                raise SettingsError(
                    f"baselines: '{name}' needs logits, and task '{task_name}' ({task.kind}) gives none"
                )
            if name == "ensemble" and not task.has_ensembles:
                raise SettingsError(
                    f"baselines: task '{task_name}' is judged by more than a model's logits (what it generates, its features): "
                    "leave 'ensemble' out"
                )
            if name == "all_data" and task_name not in unseen and not task.size("train"):
                raise SettingsError(f"baselines: 'all_data' trains on every task, and '{task_name}' has no train split")
            if name == "fine_tuned" and not task.has_split("validation"):
                raise SettingsError(f"baselines: 'fine_tuned' needs validation labels, and '{task_name}' has none")


def measure_baselines(
    opened: OpenCampaign, statistics: Files, directory: Directory, ledger: Ledger, provenance: Provenance, display: Display,
    *, winner: Recipe | None = None,
) -> list[Row]:  # fmt: skip
    """Measures the campaign's baselines and records them; what the ledger has already is not measured again.

    Args:
        opened: The campaign.
        statistics: Member → statistics files.
        directory: The campaign's; the model of all data is trained in it.
        ledger: Gets a row of origin `reference` for each and every split.
        provenance: What every row says.
        display: Shows progress.
        winner: The best merge, which `fine_tuned` starts from; None before it is known: then on validation, else on test.

    Returns:
        The rows.
    """
    split: Split = "test" if winner else "validation"
    wanted = [name for name in opened.campaign.baselines if name != "fine_tuned" or winner]
    if not wanted or not any(task.has_split(split) for task in opened.tasks.values()):
        return []
    recipes = {name: _recipe(name, opened, winner) for name in wanted}
    missing = [name for name in wanted if not ledger.has(recipes[name].identity, split)]
    places = _trained(opened, directory, display) if "all_data" in missing else {}
    setup, limit = opened.setup(statistics), opened.campaign.search.examples if split == "validation" else None
    calls: dict[str, tuple[Any, ...]] = {}
    functions: dict[str, Any] = {}
    for name in missing:
        if name == "ensemble":
            members = tuple(opened.pool.members)
            functions[name], calls[name] = jobs.ensemble, (setup, members, split, "probabilities", limit)
        elif name == "all_data":
            bound = {
                task: BoundTask(task, opened.campaign.tasks[task], place, opened.campaign.base)
                for task, place in places.items()
            }
            functions[name] = jobs.checkpoints
            calls[name] = (bound, split, limit, opened.precision)
        else:
            functions[name], calls[name] = jobs.fine_tuned, (setup, winner, opened.campaign.training, split)
    resources = opened.campaign.resources
    title = f"Baselines on {split}: {', '.join(missing).replace('_', ' ')}"
    if missing:
        with display.phase(title), display.bar("percent of the baselines", 100 * len(missing)) as bar:
            for number, name in enumerate(missing):
                run = each(
                    functions[name],
                    {name: calls[name]},
                    cpus=resources.threads,
                    gpus=0.0,
                    retries=resources.retries,
                    progress=partial(_reach, bar, number),
                )
                ((_, measured),) = run
                ledger.append(_row(recipes[name], split, measured, directory, provenance))
    rows = {(row.candidate, row.split): row for row in ledger.rows()}
    return [rows[recipes[name].identity, split] for name in wanted]


def _reach(bar: Bar, done: int, share: float) -> None:
    bar.reach(int(100 * (done + share)))


def _recipe(name: Baseline, opened: OpenCampaign, winner: Recipe | None) -> Recipe:
    """What stands for a baseline in the ledger."""
    if name == "ensemble":
        return Recipe(name, dict.fromkeys(opened.pool.members, 1.0), {"mean": "probabilities"})
    training = {f"training.{key}": value for key, value in opened.campaign.training.model_dump().items()}
    if name == "all_data" or winner is None:
        return Recipe(name, {}, training)
    return Recipe(name, winner.scaling, {"start": winner.identity, **training})


def all_data_lessons(opened: OpenCampaign) -> dict[str, Lesson]:
    """What the model of all data learns: every task that is a member's own, with the classes of that member's head.

    A train split may lack a class that its head has and other splits ask for. Heads of the same classes in one order are one.
    """
    campaign, unseen = opened.campaign, opened.campaign.unseen()
    lessons = {name: lesson(campaign.base, task) for name, task in campaign.tasks.items() if name not in unseen}
    for name, made in lessons.items():
        classes = getattr(opened.tasks[name], "classes", ())
        if made.labels and all(label.isdecimal() for label in made.labels):
            lessons[name] = replace(made, labels=[str(number) for number in range(max(len(classes), len(made.labels)))])
        elif made.labels and set(made.labels) <= set(classes):
            lessons[name] = replace(made, labels=tuple(classes))
    return lessons


def _trained(opened: OpenCampaign, directory: Directory, display: Display) -> Mapping[str, str]:
    """Task → checkpoint of the model that was trained on all of them, in the campaign's directory."""
    campaign = opened.campaign
    if not addresses.is_local(directory.path):
        raise SettingsError("baselines: 'all_data' is trained into the campaign's directory, which must be a local one")
    unseen = campaign.unseen()
    course = Course(campaign.base, all_data_lessons(opened), addresses.local_path(directory / ALL_DATA))
    made = run_courses({"all data": course}, campaign.training, campaign.resources.threads, display)
    places = {task: str(place) for task, place in made["all data"].places.items()}
    heads = set(
        places.values()
    )  # of one head for all, unseen tasks are judged by it; of several, nobody knows by which
    return places | (dict.fromkeys(unseen, next(iter(heads))) if len(heads) == 1 else {})


def _row(recipe: Recipe, split: str, measured: jobs.Measured, directory: Directory, provenance: Provenance) -> Row:
    scores = {task: score for task, (score, _) in measured.items()}
    influences = {task: own for task, (_, own) in measured.items() if own is not None}
    seconds = sum(score.seconds for score in scores.values())
    candidate = Candidate(recipe, split, "reference")
    outcome = Outcome(
        candidate, Measurement(scores=scores, evaluate_seconds=seconds, trace=Trace([scores], influences=influences))
    )
    if split == "test":
        KeptPredictions(directory.test_predictions).learn(outcome)
    return make_row(outcome, {}, None, provenance)
