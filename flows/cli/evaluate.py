"""`mergequest evaluate`: recipes, checkpoints and members on a campaign's tasks."""

from collections import deque
from collections.abc import Sequence
from typing import get_args

from rich.console import Console
from rich.table import Table

from flows.campaign.cluster import connected
from flows.campaign.evaluators import evaluators
from flows.campaign.needed_statistics import published_files
from flows.campaign.open_campaign import OpenCampaign, open_campaign
from flows.config.campaign_file import Campaign
from flows.config.recipe_file import load_recipe
from flows.config.yaml_file import validate
from flows.directory.progress import Display
from merging.errors import SettingsError, TaskError
from merging.io import addresses, storage
from merging.optimization.gradient_mismatch import Mismatch
from merging.recipe import REFERENCE_BASE, Recipe, base_recipe, member_recipe
from merging.registry import did_you_mean
from merging.tasks.task import Score, Split
from ray_tasks.jobs.gradients import measure_mismatch
from ray_tasks.jobs.parallel import each
from ray_tasks.jobs.statistics import BoundTask
from search.candidate import Candidate
from search.in_flight import InFlight


def evaluate(campaign: Campaign, what: Sequence[str], split: str, display: Display, mismatch: bool = False) -> None:
    """Prints the scores of recipe files, merged checkpoints, members by name, or `base`.

    Args:
        campaign: Gives base, tasks and heads.
        what: What to score; a checkpoint's directory joins the pool as one more member, and a recipe file's members and
            statistics do, too.
        split: Which examples.
        display: Shows progress.
        mismatch: Also prints each model's gradient mismatch over its members' tasks, with a recipe's own factors and numbers of
            examples; of base and members over all tasks. It takes no labels.

    Raises:
        MergequestError: Something is unusable.
    """
    if split not in get_args(Split):
        raise SettingsError(f"unknown split '{split}'. {did_you_mean(split, list(get_args(Split)))}")
    recipes: dict[str, Recipe] = {}
    joined = campaign.model_dump(mode="json")
    for name in what:
        recipes[name] = _recipe(name, campaign, joined)
    with display.phase("Pool"):
        opened = open_campaign(validate(Campaign, {**joined, "directory": None}, "evaluate"), display)
    scores: dict[str, dict[str, Score]] = {}
    norms: dict[str, Mismatch] = {}
    with connected(campaign) as cluster:
        with evaluators(opened, published_files(opened), cluster, display) as executor:
            names = {recipe.identity: name for name, recipe in recipes.items()}
            queue = deque(recipes.values())
            in_flight = InFlight(executor, campaign.resources.retries)
            with display.bar("models", len(queue)) as bar:
                while queue or len(in_flight):
                    while queue and in_flight.has_room:
                        in_flight.submit(Candidate(queue.popleft(), split))
                    for outcome in in_flight.wait():
                        bar.advance()
                        name = names[outcome.candidate.recipe.identity]
                        if outcome.measurement is None:
                            raise TaskError(f"{name}: {outcome.error}")
                        scores[name] = dict(outcome.measurement.scores)
        if mismatch:
            norms = _mismatches(opened, recipes, display)
    _print(scores, norms, list(what), list(opened.tasks))


def _recipe(name: str, campaign: Campaign, joined: dict[str, dict[str, dict[str, object]]]) -> Recipe:
    """What a word of the command line means; adds to `joined` the members that it brings."""
    if name == REFERENCE_BASE:
        return base_recipe()
    if name in campaign.members:
        return member_recipe(name)
    path = addresses.absolute(name)
    if storage.is_dir(path):
        member = addresses.base_name(path)
        if member in joined["members"]:
            raise SettingsError(f"{name}: '{member}' is a member's name already; rename the directory")
        joined["members"][member] = {"checkpoint": path}
        return member_recipe(member)
    if not storage.exists(path):
        raise SettingsError(
            f"'{name}' is no member ({', '.join(campaign.members)}), no recipe file and no checkpoint's directory"
        )
    file = load_recipe(path)
    if file.base != campaign.base:
        raise SettingsError(f"{name} merges from {file.base}, the campaign's base is {campaign.base}")
    for member, settings in file.members.items():
        there = joined["members"].setdefault(member, settings.model_dump(mode="json"))
        if there["checkpoint"] != settings.checkpoint:
            raise SettingsError(f"{name}: '{member}' is {settings.checkpoint}, in the campaign {there['checkpoint']}")
        if settings.statistics:
            there["statistics"] = list(settings.statistics)
    return file.recipe()


def _mismatches(opened: OpenCampaign, recipes: dict[str, Recipe], display: Display) -> dict[str, Mismatch]:
    """Each model's gradient mismatch over the tasks of all members that have one with data."""
    campaign = opened.campaign
    tasks = {
        member: BoundTask(source, campaign.sources()[source][0], campaign.members[member].checkpoint, campaign.base)
        for member in opened.pool.members
        if (source := campaign.source_of(member))
        and opened.sources[source].has_logits
        and opened.sources[source].size("train")
    }
    setup = opened.setup(published_files(opened))
    calls = {name: (setup, tasks, recipe) for name, recipe in recipes.items()}
    with display.bar("gradients", 100) as bar:
        norms = each(
            measure_mismatch, calls, cpus=campaign.resources.threads, progress=lambda s: bar.reach(int(100 * s))
        )
        return dict(norms)


def _print(scores: dict[str, dict[str, Score]], norms: dict[str, Mismatch], order: list[str], tasks: list[str]) -> None:
    """A table: models down, tasks across; and one of gradient mismatches, if they were asked for."""
    table = Table("model", *tasks, "mean")
    for name in order:
        own = [scores[name][task] for task in tasks]
        mean = sum(score.value for score in own) / len(own)
        table.add_row(name, *(f"{score.value:.4f} ± {score.standard_error:.4f}" for score in own), f"{mean:.4f}")
    Console().print(table)
    if norms:
        members = sorted({member for mismatch in norms.values() for member in mismatch.members})
        mismatches = Table("gradient mismatch", *members, "all")
        for name in order:
            mismatches.add_row(
                name, *(f"{norms[name].members.get(member, 0.0):.3g}" for member in members), f"{norms[name].total:.4g}"
            )
        Console().print(mismatches)
