"""Whether every stage that a campaign asks for has something to work on: found before any work."""

import math
from collections.abc import Callable, Iterator, Mapping

from flows.campaign.open_campaign import OpenCampaign
from flows.config.sections import DistilSettings
from flows.config.yaml_file import require_writable
from merging.errors import SettingsError
from merging.mergers.linear_basis import is_linear
from merging.optimization.quadratic_model import CURVATURES
from merging.tasks.task import Split, Task
from search.objective import split_name

MOST_WEIGHTS = 10**9
"""Of a model that is distilled into unasked: it takes six times its weights of memory, and a core some minutes for each
hundred million."""
FEWEST_INPUTS = 16
"""Of each member, for distillation unasked."""


def require_stages(opened: OpenCampaign) -> None:
    """Looks whether distillation, gradient descent, theory and the objectives have what they need; computes nothing.

    Raises:
        SettingsError: A stage would do nothing, or stop the run when its turn comes.
    """
    search = opened.campaign.search
    if opened.campaign.distil:
        _require_batches(opened.sources, "distil", "train")
        _require_teachers(opened, opened.campaign.distil)
    if search.gradient is not None:
        unlabelled = search.gradient.loss == "distil"
        seen = {name: task for name, task in opened.tasks.items() if name not in opened.campaign.unseen()}
        tasks: Mapping[str, Task] = opened.sources if unlabelled else seen
        _require_batches(tasks, "search.gradient", "train" if unlabelled else "validation")
        _require_linear(opened)
    if search.theory_starts:
        _require_curvature(opened)
    _require_scores(opened)


def require_kept_scores(opened: OpenCampaign, note: Callable[[str], None]) -> None:
    """Looks whether scores can be kept between campaigns, where the file asks for it.

    Args:
        opened: The campaign.
        note: Told which tasks are measured every time all the same.

    Raises:
        SettingsError: The directory cannot be written, or no task's scores can be kept.
        StorageError: The same of a remote one.
    """
    cache = opened.campaign.evaluation.cache
    if cache is None:
        return
    require_writable(cache)
    unknown = ", ".join(f"'{name}'" for name in opened.tasks if name not in opened.score_fingerprints)
    if not opened.score_fingerprints:
        raise SettingsError(
            f"evaluation.cache: the scores of {unknown} depend on code of your own, whose results nobody can tell from its "
            "content: leave the cache out"
        )
    if unknown:
        note(f"evaluation.cache: {unknown} is measured every time, for the score depends on code of your own")


def distillation(opened: OpenCampaign) -> DistilSettings | None:
    """How the best merge is distilled into; None where it is not.

    Where the campaign file says nothing, it is wherever every member has examples that its own model runs on, and the model is
    not so large that its optimizer would surprise a machine which has room to merge it.
    """
    campaign = opened.campaign
    if campaign.distil is not None:
        return campaign.distil or None
    names = [campaign.source_of(member) for member in opened.pool.members]
    sources = [opened.sources[name] for name in names if name is not None and name in opened.sources]
    if len(sources) < len(names) or not all(source.has_logits for source in sources):
        return None
    size = sum(math.prod(info.shape) for info in opened.pool.weights.values())
    enough = all(source.size("train") >= FEWEST_INPUTS for source in sources)
    return DistilSettings() if enough and size <= MOST_WEIGHTS else None


def _require_batches(tasks: Mapping[str, Task], stage: str, split: Split) -> None:
    """A stage trains on the tasks that have logits; those that lack the split would stop it."""
    trained = {name: task for name, task in tasks.items() if task.has_logits}
    if not trained:
        raise SettingsError(
            f"{stage}: there is nothing to train on, for no task gives batches and logits (custom evaluators give scores "
            f"alone): leave `{stage}` out"
        )
    if without := [name for name, task in trained.items() if not task.size(split)]:
        raise SettingsError(f"{stage}: task '{without[0]}' has no {split} examples: add them, or leave `{stage}` out")


def _require_teachers(opened: OpenCampaign, settings: DistilSettings) -> None:
    """What is set for a member that teaches nothing would change nothing."""
    sources = opened.campaign.sources()
    teachers = {sources[name][1] for name, task in opened.sources.items() if task.has_logits}
    for field, given in (("weights", settings.weights), ("temperatures", settings.temperatures)):
        if idle := sorted(given.keys() - teachers):
            raise SettingsError(
                f"distil.{field}: '{idle[0]}' teaches nothing: it has no examples of its own, or another member's head runs on "
                f"its task. Teachers are {', '.join(sorted(teachers))}; give it `calibration` data, or leave it out"
            )


def _require_linear(opened: OpenCampaign) -> None:
    """Gradient descent starts from methods that are linear in their factors."""
    settings = opened.campaign.search.gradient
    if settings is None or settings.start is not None:
        return
    linear = set(_linear_methods(opened))
    if strange := [name for name in settings.methods if name not in linear]:
        raise SettingsError(
            f"search.gradient.methods: '{strange[0]}' is none of the search's methods that are linear in their scaling factors "
            f"({', '.join(sorted(linear)) or 'there are none'})"
        )
    if not linear:
        raise SettingsError(
            "search.gradient: no method of the search is linear in its scaling factors, so that there is no gradient to "
            "follow: add task_arithmetic, name a `start`, or leave `search.gradient` out"
        )


def _require_curvature(opened: OpenCampaign) -> None:
    """Theory predicts from Fisher or Gram statistics, for linear methods."""
    if not any(kind in opened.kinds for kind in CURVATURES) or not any(_linear_methods(opened)):
        raise SettingsError(
            f"search.theory_starts: theory needs a method that asks for {' or '.join(CURVATURES)} statistics, and one that is "
            "linear in its scaling factors (regmean and task_arithmetic, say): add them, or leave `search.theory_starts` out"
        )


def _linear_methods(opened: OpenCampaign) -> Iterator[str]:
    for recipe in opened.space().baselines():
        if is_linear(recipe) and recipe.method in opened.campaign.search.methods:
            yield recipe.method


def divides_by_unknown(opened: OpenCampaign) -> bool:
    """Whether an objective divides by scores that may turn out to be 0 or negative, which only measuring tells."""
    search, tasks = opened.campaign.search, opened.tasks
    return "normalized" in search.objectives and any(task.can_be_negative for task in tasks.values())


def _require_scores(opened: OpenCampaign) -> None:
    """Objectives read scores that some kinds of task do not give, or divide by scores that are negative."""
    search, tasks = opened.campaign.search, list(opened.tasks)
    for objective in search.objectives:
        plain, expected = split_name(objective, tasks)
        unseen = opened.campaign.unseen()
        seen = [task for task in tasks if task not in unseen]
        counted = [plain] if plain in tasks else unseen if plain == "unseen" else seen
        if plain == "weighted":
            counted = [task for task in tasks if search.weights.get(task)]
        if plain == "normalized":
            owned = {opened.campaign.task_of(member) for member in opened.pool.members}
            if lacking := [task for task in seen if task not in owned]:
                raise SettingsError(
                    f"search.objective: '{objective}' divides by the score of each task's own member, and task '{lacking[0]}' "
                    f"has none: give a member `task: {lacking[0]}`, or use 'mean' or 'worst'"
                )
        for name in counted:
            if expected and not opened.tasks[name].has_surrogates:
                raise SettingsError(
                    f"search.objective: '{objective}' asks for expected errors, and task '{name}' gives none, only its metric: "
                    f"use '{plain}'"
                )
            if plain == "normalized" and not expected and opened.tasks[name].is_below_zero:
                raise SettingsError(
                    f"search.objective: '{objective}' divides by each task's own member, and the scores of task '{name}' "
                    "are negative: use 'mean' or 'worst'"
                )
