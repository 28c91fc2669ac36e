"""From a campaign file to an opened pool and tasks: everything that can be wrong is found here, before any work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch

from flows.campaign.cluster import evaluator_gpus, node_kind
from flows.campaign.weight_checks import examined, known
from flows.config.campaign_file import Campaign
from flows.config.files_from import notes_on
from flows.config.sections import BaseData
from flows.directory.campaign_directory import known_revisions
from flows.directory.progress import Display
from merging.checkpoints.pool import Pool
from merging.checkpoints.renumbered import Renumbered
from merging.errors import SettingsError
from merging.evaluation.engines.engine_models import check_engine
from merging.evaluation.live_models import check_models
from merging.evaluation.memory import EvaluatorMemory, fed_memory, resident_memory
from merging.evaluation.score_cache import ScoreCache, make_score_cache
from merging.io import hub
from merging.mergers.material import Material, open_statistics
from merging.methods import METHODS, Method
from merging.recipe import BASE, Recipe, Value
from merging.tasks import make_task
from merging.tasks.task import SPLITS, Split, Task
from merging.tasks.user_functions import search_last
from ray_tasks.connect import NodeKind
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.sharded.nixl_transfer import BUFFERS
from search.space.method_space import MethodSpace, weight_groups
from search.space.ranges import Domain
from search.space.search_space import Space

Files: TypeAlias = Mapping[str, tuple[str, ...]]
"""Member, `base`, or names joined by + → paths of statistics files."""


@dataclass(frozen=True)
class OpenCampaign:
    """A campaign's pool and tasks, checked.

    Args:
        campaign: The campaign.
        pool: Base and members.
        tasks: Task → task, bound to the head of its owner.
        sources: What statistics are computed from, see `Campaign.sources`: name → task, bound to the head of its owner.
        distances: Member → ‖θ_t − θ_0‖ / ‖θ_0‖.
        revisions: Checkpoint on the Hub as the file names it → with the commit that it stands for.
    """

    campaign: Campaign
    pool: Pool
    tasks: Mapping[str, Task]
    sources: Mapping[str, Task]
    distances: Mapping[str, float]
    revisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Kinds of statistic that the campaign's methods need."""
        return sorted({kind for method, parameters in self.variants() for kind in method.needs(parameters).members})

    @property
    def base_kinds(self) -> list[str]:
        """Kinds of statistic of the base itself that the campaign's methods need."""
        return sorted({kind for method, parameters in self.variants() for kind in method.needs(parameters).base})

    def variants(self) -> Iterator[tuple[Method, dict[str, Value]]]:
        """The campaign's methods, each with every value that a parameter may take, one parameter at a time."""
        for name, space in self.campaign.search.methods.items():
            method = METHODS[name]
            usual = {key: spec.default for key, spec in method.parameters.items()}
            if not space.parameters:
                yield method, usual
            for key, domain in space.parameters.items():
                for value in domain.values:
                    yield method, {**usual, key: value}

    def examples(self) -> dict[str, int]:
        """Member, or `base` → number of training examples behind it, where that is known."""
        counts = {}
        for member, settings in self.campaign.members.items():
            source = self.campaign.source_of(member)
            size = settings.examples or (self.sources[source].size("train") if source else 0)
            if size:
                counts[member] = size
        own = self.campaign.base_data
        if size := own.examples or (self.tasks[own.task].size("train") if own.task else 0):
            counts[BASE] = size
        return counts

    def task_of(self, member: str) -> Task | None:
        """A member's own task, bound to its own checkpoint; None where it has none here."""
        name = self.campaign.task_of(member)
        if name is None:
            return None
        return make_task(name, self.campaign.tasks[name], self.campaign.members[member].checkpoint, self.campaign.base)

    def setup(self, statistics: Mapping[str, tuple[str, ...]]) -> Setup:
        """What an evaluator builds itself from."""
        campaign = self.campaign
        return Setup(
            base=campaign.base,
            members={name: member.checkpoint for name, member in campaign.members.items()},
            heads=campaign.heads,
            vocabulary=campaign.vocabulary,
            statistics=statistics,
            examples=self.examples(),
            tasks=dict(campaign.tasks),
            owners=campaign.owners(),
            sources=campaign.sources(),
            precision=self.precision,
            dtype=self.dtype,
            engine=campaign.engine,
            facts=known(self.pool),
        )

    @cached_property
    def score_fingerprints(self) -> dict[str, dict[Split, str]]:
        """Task → split → what its scores depend on besides the model, of tasks of which that is known."""
        prints: dict[str, dict[Split, str]] = {}
        for name, task in self.tasks.items():
            for split in SPLITS[1:]:
                if task.has_split(split) and (own := task.score_fingerprint(split)) is not None:
                    prints.setdefault(name, {})[split] = own
        return prints

    @property
    def published(self) -> list[str]:
        """Paths of the statistics files that the campaign names."""
        campaign = self.campaign
        return [*campaign.base_data.statistics, *(p for m in campaign.members.values() for p in m.statistics)]

    def score_cache(self, statistics: Mapping[str, tuple[str, ...]]) -> ScoreCache | None:
        """Where scores are kept between campaigns; None where the file names no place."""
        campaign = self.campaign
        if campaign.evaluation.cache is None:
            return None
        engine = campaign.engine.model_dump(mode="json", exclude={"bucket", "cache"})
        settings = [campaign.vocabulary, campaign.resources.dtype, engine]
        material = Material(self.pool, open_statistics(self.pool, statistics), self.examples())
        return make_score_cache(
            campaign.evaluation.cache,
            material,
            self.score_fingerprints,
            campaign.owners(),
            settings=settings,
            published=self.published,
        )

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Content hashes of base, members and evaluation data: `pool.json`. Texts and tokenizers are hashed once."""
        data = {
            name: {split: task.data_fingerprint(split) for split in ("validation", "test") if task.has_split(split)}
            for name, task in self.tasks.items()
        }
        return {
            "checkpoints": self.pool.fingerprints(),
            "configurations": self.pool.configurations(),
            "data": data,
            "metrics": {name: task.judged_by for name, task in self.tasks.items()},
            "relative_distance": {name: round(value, 6) for name, value in self.distances.items()},
            "merged": len(self.pool.weights),
            "heads": {name: list(member.head) for name, member in self.pool.members.items()},
            "revisions": dict(self.revisions),
        }

    def space(self, subsets: Sequence[Sequence[str]] | None = None, starts: Sequence[Recipe] = ()) -> Space:
        """What the campaign searches, over these subsets of members or over all members always, from these starts.

        Raises:
            MethodError: Groups of weights do not fit the pool.
            SettingsError: The methods' ranges do not fit them, or the members.
        """
        search = self.campaign.search
        groups = weight_groups(search.scaling, list(self.pool.weights), search.depth_groups, search.patterns)
        return Space(self._methods(), list(self.pool.members), subsets, search.scaling, groups, starts)

    def _methods(self) -> dict[str, MethodSpace]:
        """The campaign's methods; defaults that follow the architecture are spelled out."""
        methods = {}
        for name, given in self.campaign.search.methods.items():
            usual = METHODS[name].defaults(self.pool.model_type)
            own = {
                key: Domain(value=usual[key])
                for key, spec in METHODS[name].parameters.items()
                if usual[key] != spec.default and key not in given.parameters and not spec.search
            }
            methods[name] = given.model_copy(update={"parameters": {**given.parameters, **own}}) if own else given
        return methods

    def evaluator_memory(
        self, statistics: Mapping[str, tuple[str, ...]], *, sharded: bool = False, on_gpu: bool = False
    ) -> EvaluatorMemory:
        """Estimated memory of an evaluator.

        Args:
            statistics: Member → statistics files.
            sharded: Of one that merges nothing itself, and holds models and the next candidate's weights; two candidates'
                where shards write these into its memory.
            on_gpu: Of one whose models lie on a GPU.
        """
        owners = list(self.campaign.owners().values())
        if sharded:
            waiting = BUFFERS if self.campaign.resources.transport == "nixl" else 1
            return fed_memory(self.pool, owners, waiting, self.dtype, engine=self.campaign.engine)
        material = Material(self.pool, open_statistics(self.pool, statistics))
        return resident_memory(
            material, list(self.campaign.search.methods), owners, self.dtype, on_gpu=on_gpu, engine=self.campaign.engine
        )

    @property
    def nodes(self) -> NodeKind:
        """Which nodes work on GPUs may be started on."""
        return node_kind(self.campaign)

    @property
    def gpus(self) -> float:
        """GPUs of an evaluator on the cluster that was joined."""
        return evaluator_gpus(self.campaign)

    @property
    def precision(self) -> str:
        """Of evaluation; float32 until an automatic choice is made."""
        given = self.campaign.resources.precision
        return "float32" if given == "auto" else given

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the models that are scored; None for the checkpoints' own."""
        return torch.float32 if self.campaign.resources.dtype == "float32" else None


def open_campaign(campaign: Campaign, display: Display, directory: str | None = None) -> OpenCampaign:
    """Opens and checks pool and tasks.

    Args:
        campaign: The campaign.
        display: Shows notes and progress.
        directory: Where an earlier run may have kept what it knew of the pool's files.

    Raises:
        MergequestError: Something is unusable; the message names it.
    """
    if campaign.environment.working_dir is not None:
        search_last(campaign.environment.working_dir)
    campaign, revisions = _pinned(campaign, known_revisions(directory) if directory else {})
    pool = Pool.open(
        campaign.base,
        {name: member.checkpoint for name, member in campaign.members.items()},
        campaign.heads,
        campaign.vocabulary,
    )
    for note in notes_on(pool):
        display.note(note)
    campaign.files_from.files(pool)  # for the errors that it raises
    if pool.files:
        raise SettingsError(
            "vocabulary: `union` adds tokens, for which no task's model has rows. Search with `vocabulary: base`, then merge "
            "the winner's recipe with `union`"
        )
    owners = campaign.owners()
    for task_name, owner in owners.items():
        checkpoint = pool.members[owner].checkpoint
        if isinstance(checkpoint, Renumbered) and checkpoint.moves_tokens:
            raise SettingsError(
                f"tasks.{task_name}: the tokenizer of its head's member '{owner}' has tokens where the merge has others or "
                "none, so that the merge would be measured on the wrong ones. Name another member under `task_heads`, or merge "
                "by a recipe"
            )
    tasks = {
        name: make_task(name, settings, campaign.members[owners[name]].checkpoint, campaign.base)
        for name, settings in campaign.tasks.items()
    }
    sources = {
        name: tasks.get(name) or make_task(name, settings, campaign.members[owner].checkpoint, campaign.base)
        for name, (settings, owner) in campaign.sources().items()
    }
    for name, task in {**tasks, **sources}.items():
        for note in task.check():
            if name in tasks or note not in task.missing_splits():  # calibration data are a train split alone
                display.note(note)
        if name in tasks and not task.has_split("validation"):
            raise SettingsError(f"task '{name}' has no validation split, which candidates are scored on: add one")
    for name in campaign.unseen():
        if name not in campaign.task_heads and (kept := pool.members[owners[name]].head):
            raise SettingsError(
                f"tasks.{name}: it belongs to no member, and members keep heads of their own ({kept[0]}), so that it is not "
                f"known which one to judge by: name a member under `task_heads`"
            )
    check_models(pool, list(tasks.values()), owners)
    if campaign.engine.kind == "vllm":
        check_engine(pool, list(tasks.values()), owners, campaign.engine)
    distances = examined(campaign, pool, directory, display)
    for note in _alike(pool, distances):
        display.note(note)
    size = sum(info.nbytes for info in pool.weights.values())
    heads = {key for member in pool.members.values() for key in member.head}
    display.say(
        f"  {pool.base.architecture}: {len(pool.members)} members, {len(pool.weights)} merged weights "
        f"({size / 1e6:.0f} MB), {len(heads)} tensors kept per task, {len(tasks)} tasks"
    )
    opened = OpenCampaign(campaign, pool, tasks, sources, distances, revisions)
    opened.space()  # for the errors that it raises
    if opened.base_kinds and campaign.base_data == BaseData():
        raise SettingsError(
            f"search.methods: a method needs the {opened.base_kinds[0]} of the base on its own data. Set base_data.task (a "
            "task for which the base has a head of its own) or base_data.statistics (a file), or leave base_curvature at "
            "'identity'"
        )
    return opened


def _pinned(campaign: Campaign, before: Mapping[str, str]) -> tuple[Campaign, dict[str, str]]:
    """The campaign with the commit of each checkpoint that is on the Hub: the one that it was begun with, or today's.

    Returns:
        The campaign; and checkpoint as its file names it → with its commit.

    Raises:
        StorageError: One cannot be had.
    """
    named = [campaign.base, *(member.checkpoint for member in campaign.members.values())]
    commits = {path: hub.pinned(before.get(path, path)) for path in named}
    members = {
        name: member.model_copy(update={"checkpoint": commits[member.checkpoint]})
        for name, member in campaign.members.items()
    }
    fixed = campaign.model_copy(update={"base": commits[campaign.base], "members": members})
    return fixed, {path: commit for path, commit in commits.items() if path != commit}


def _alike(pool: Pool, distances: Mapping[str, float]) -> Iterator[str]:
    """Members that are the base, or one another: no error, but seldom meant."""
    twins: dict[str, list[str]] = {}
    for name, member in pool.members.items():
        if distances[name] == 0.0:
            yield f"'{name}' has the base's own weights"
        if member.checkpoint.is_recognised:
            twins.setdefault(member.checkpoint.fingerprint, []).append(name)
    for names in twins.values():
        if len(names) > 1:
            yield f"{', '.join(names)} are the same checkpoint, which counts {len(names)} times"
