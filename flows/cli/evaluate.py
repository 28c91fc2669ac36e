"""`mergequest evaluate`: recipes, checkpoints and members on a campaign's tasks."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from flows.campaign.cluster import connected
from flows.campaign.evaluators import evaluators
from flows.campaign.needed_statistics import joined as files_joined
from flows.campaign.needed_statistics import published_files
from flows.campaign.open_campaign import Files, OpenCampaign, open_campaign
from flows.campaign.precision import UNDECIDED, kept_choice, with_choice
from flows.cli.steer import require_same_merge
from flows.config.campaign_file import Campaign
from flows.config.recipe_file import load_recipe
from flows.config.yaml_file import validate
from flows.directory.campaign_directory import begun_directory, is_same_checkpoint, known_revisions
from flows.directory.progress import Display
from merging.errors import SettingsError, TaskError
from merging.io import addresses, storage
from merging.optimization.gradient_mismatch import Mismatch
from merging.recipe import BASE, REFERENCE_BASE, Recipe, base_recipe, member_recipe
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
    begun = begun_directory(campaign)
    revisions = known_revisions(begun.path) if begun else {}
    joined = _Joined(campaign, revisions)
    recipes = {name: joined.recipe(name) for name in what}
    with display.phase("Pool"):
        whole = validate(Campaign, {**joined.settings, "directory": None}, "evaluate")
        opened = open_campaign(whole, display, begun.path if begun else None)
    if opened.campaign.resources.precision == "auto":
        choice = (kept_choice(begun) if begun else None) or UNDECIDED
        opened = with_choice(opened, choice)
        display.say(f"  {choice.why}")
    statistics = files_joined(published_files(opened), joined.solutions)
    scores: dict[str, dict[str, Score]] = {}
    norms: dict[str, Mismatch] = {}
    with connected(campaign) as cluster:
        with evaluators(opened, statistics, cluster, display) as executor:
            queue = deque({recipe.identity: recipe for recipe in recipes.values()}.values())
            in_flight = InFlight(executor, campaign.resources.retries)
            with display.bar("models", len(queue)) as bar:
                while queue or len(in_flight):
                    while queue and in_flight.has_room:
                        in_flight.submit(Candidate(queue.popleft(), split))
                    for outcome in in_flight.wait():
                        bar.advance()
                        recipe = outcome.candidate.recipe
                        same = [name for name in recipes if recipes[name].identity == recipe.identity]
                        if outcome.measurement is None:
                            raise TaskError(f"{same[0]}: {outcome.error}")
                        scores |= {name: dict(outcome.measurement.scores) for name in same}
        if mismatch:
            norms = _mismatches(opened, statistics, recipes, display)
    _print(scores, norms, list(what), list(opened.tasks))


class _Joined:
    """A campaign's settings with what recipe files and checkpoints bring.

    Args:
        campaign: The campaign.
        revisions: Checkpoint on the Hub → with the commit that the campaign began with.
    """

    def __init__(self, campaign: Campaign, revisions: Mapping[str, str]) -> None:
        self._campaign, self._revisions = campaign, revisions
        self._brought: dict[str, tuple[Any, str]] = {}
        self.settings: dict[str, Any] = campaign.model_dump(mode="json")
        self.solutions: dict[str, tuple[str, ...]] = {}
        """Names of the members joined by + → solutions of these together."""

    def recipe(self, name: str) -> Recipe:
        """What a word of the command line means; the members that it brings join the campaign's.

        Raises:
            SettingsError: It means nothing, or does not go with the campaign, or with a word before it.
        """
        members = self.settings["members"]
        if name == REFERENCE_BASE:
            return base_recipe()
        if name in self._campaign.members:
            return member_recipe(name)
        path = addresses.absolute(name)
        if storage.is_dir(path):
            member = addresses.base_name(path)
            if members.setdefault(member, {"checkpoint": path}) != {"checkpoint": path}:
                raise SettingsError(f"{name}: '{member}' is a member's name already; rename the directory")
            return member_recipe(member)
        if not storage.exists(path):
            raise SettingsError(
                f"'{name}' is no member ({', '.join(self._campaign.members)}), no recipe file and no checkpoint's directory"
            )
        file = load_recipe(path)
        require_same_merge(name, file, self._campaign, self._revisions)
        for member, settings in file.members.items():
            there = members.setdefault(member, settings.model_dump(mode="json"))
            if not is_same_checkpoint(there["checkpoint"], settings.checkpoint, self._revisions):
                raise SettingsError(
                    f"{name}: '{member}' is {settings.checkpoint}, in the campaign {there['checkpoint']}"
                )
            self._bring(name, there, member, settings.statistics, settings.examples)
        self._bring(name, self.settings["base_data"], BASE, file.base_statistics, file.base_examples)
        if file.statistics:
            together = "+".join(sorted(file.members))
            self._once(name, f"solution of {together}", file.statistics)
            self.solutions[together] = file.statistics
        return file.recipe()

    def _bring(
        self, name: str, there: dict[str, Any], who: str, statistics: Sequence[str], examples: int | None
    ) -> None:
        """Puts a recipe's statistics and number of examples in the place of the campaign's."""
        if statistics:
            self._once(name, f"statistics of {who}", tuple(statistics))
            there["statistics"] = list(statistics)
        if examples:
            self._once(name, f"number of examples of {who}", examples)
            there["examples"] = examples

    def _once(self, name: str, what: str, value: Any) -> None:
        known, first = self._brought.setdefault(what, (value, name))
        if known != value:
            raise SettingsError(f"{first} and {name} have another {what} each: evaluate them one at a time")


def _mismatches(
    opened: OpenCampaign, statistics: Files, recipes: dict[str, Recipe], display: Display
) -> dict[str, Mismatch]:
    """Each model's gradient mismatch over the tasks of all members that have one with data."""
    campaign = opened.campaign
    tasks = {
        member: BoundTask(source, campaign.sources()[source][0], campaign.members[member].checkpoint, campaign.base)
        for member in opened.pool.members
        if (source := campaign.source_of(member))
        and opened.sources[source].has_logits
        and opened.sources[source].size("train")
    }
    setup = opened.setup(statistics)
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
