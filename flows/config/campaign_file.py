"""The campaign file: one model that documents, checks and completes what a user asks for."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from flows.config.files_from import FilesFrom
from flows.config.overrides import with_overrides
from flows.config.pool_settings import BaseCheckpoint, MaxDistance, MemberSettings, MergeVocabulary, resolve_pool
from flows.config.search_settings import PATIENCE_BEFORE_DISTILLATION, PRUNED_SAMPLERS, WITH_DATA, SearchSettings
from flows.config.sections import (
    BaseData,
    Baseline,
    DistilSettings,
    EnvironmentSettings,
    EvaluationSettings,
    ResourceSettings,
    SelectionSettings,
    StatisticsSettings,
    TestSettings,
    TrackingSettings,
)
from flows.config.yaml_file import Name, Settings, changed, load_yaml, parent, require_known, resolve, said_in, validate
from merging.checkpoints.validation import MAX_DISTANCE
from merging.errors import MergequestError, SettingsError
from merging.evaluation.engines import EngineSettings
from merging.io import addresses, hashing
from merging.methods import METHODS
from merging.optimization.fine_tuning import TrainingSettings
from merging.recipe import BASE, GROUP
from merging.tasks import TASKS, AnyTaskSettings
from merging.tasks.task import Task
from search.constraints import check as check_constraints
from search.objective import EXPECTED, make_objective
from search.samplers.foreign import is_foreign, require_form
from search.samplers.make_sampler import QUALITY_DIVERSITY, SINGLE_OBJECTIVE, make_sampler
from search.space.search_space import Space

CAMPAIGN_FILE = "campaign.yaml"
CALIBRATION = "-calibration"
"""After a member's name: its own examples, beside the tasks."""
BUDGETS = (
    "candidates",
    "seconds",
    "budget_examples",
    "gpu_hours",
    "cpu_hours",
    "patience",
    "min_delta",
    "identical_errors",
    "candidate_seconds",
    "confirm",
)
"""Settings of the search that may change while a campaign stays the same."""


class PoolMember(MemberSettings):
    """A checkpoint fine-tuned from the base."""

    calibration: AnyTaskSettings | None = Field(
        None,
        description="The member's own examples (`train` of any kind of task but custom), which its statistics, representations "
        "and distillation come from, whatever judges it; by default its task's training split.",
    )

    @field_validator("calibration")
    @classmethod
    def _has_examples(cls, settings: Any) -> Any:
        if settings is not None and (not TASKS[settings.kind][0].has_logits or "train" not in settings.data):
            raise ValueError("calibration data is the `train` split of a kind of task that gives logits")
        return settings


class Campaign(Settings):
    """A campaign file."""

    name: Name = Field(description="Names the campaign in the ledger and on a shared cluster.")
    directory: str | None = Field(
        None, description="What the campaign fills; by default `runs/<name>` beside this file."
    )
    base: BaseCheckpoint
    members: dict[Name, PoolMember] = Field(
        min_length=1, description="The pool: checkpoints by name (a path alone will do)."
    )
    base_data: BaseData = Field(default_factory=BaseData, description=BaseData.__doc__)
    heads: tuple[str, ...] = Field(
        (),
        description="Patterns (classifier.*) of tensors to keep per task though base and members all have them.",
    )
    vocabulary: MergeVocabulary = "base"
    max_distance: MaxDistance = MAX_DISTANCE
    files_from: FilesFrom = Field(default_factory=FilesFrom, description=FilesFrom.__doc__)
    tasks: dict[Name, AnyTaskSettings] = Field(min_length=1, description="What a merge is judged by.")
    task_heads: dict[str, str] = Field(
        default_factory=dict,
        description="Task → member whose head it uses, where no member names the task as its own.",
    )
    statistics: StatisticsSettings = Field(default_factory=StatisticsSettings, description=StatisticsSettings.__doc__)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description=EvaluationSettings.__doc__)
    selection: SelectionSettings = Field(default_factory=SelectionSettings, description=SelectionSettings.__doc__)
    search: SearchSettings = Field(default_factory=SearchSettings, description=SearchSettings.__doc__)
    distil: DistilSettings | Literal[False] | None = Field(
        None,
        description="Distil the members' outputs on their train inputs into the best baseline, or into a proposal that is "
        "clearly better, no labels; it is measured and reported beside the merge that it started from, which stays a "
        "candidate. By default wherever every member has "
        "calibration data and the base at most a billion weights; `{}`: in any case; false: never.",
    )
    baselines: tuple[Baseline, ...] = Field(
        (),
        description="What the table shows beside base and members: ensemble (mean of all members' probabilities), all_data "
        "(one model trained on every task's training split, see `training`), fine_tuned (the winner trained on the validation "
        "labels, on test only).",
    )
    test: TestSettings = Field(default_factory=TestSettings, description=TestSettings.__doc__)
    training: TrainingSettings = Field(
        default_factory=TrainingSettings,
        description="How `mergequest train` fine-tunes members that are missing, and the baselines that are trained.",
    )
    engine: EngineSettings = Field(default_factory=EngineSettings, description=EngineSettings.__doc__)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description=TrackingSettings.__doc__)
    environment: EnvironmentSettings = Field(
        default_factory=EnvironmentSettings, description=EnvironmentSettings.__doc__
    )
    resources: ResourceSettings = Field(default_factory=ResourceSettings, description=ResourceSettings.__doc__)
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of sampler, selection and sampled statistics.")

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_its_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _engine_has_its_gpus(self) -> "Campaign":
        gpus, wanted = self.resources.gpus, self.engine.tensor_parallel
        if self.engine.kind != "vllm" and (unused := changed(self.engine, ("tensor_parallel", "bucket", "cache"))):
            raise ValueError(f"engine.{unused[0]} goes with `kind: vllm`")
        if self.engine.kind == "vllm" and gpus and max(wanted, gpus) > 1 and gpus != wanted:
            raise ValueError(
                f"engine.tensor_parallel: {wanted} of an engine's processes have a GPU each, and resources.gpus is {gpus:g}: "
                "set both to the same number"
            )
        if self.engine.kind == "vllm" and self.resources.precision != "float32":
            raise ValueError("resources.precision is of live models: an engine computes in resources.dtype")
        return self

    @model_validator(mode="before")
    @classmethod
    def _subsets_for_the_sampler(cls, value: Any) -> Any:
        """The sampler that draws subsets has every one to draw from, unless the file says which."""
        if not isinstance(value, dict):
            return value
        search, selection = value.get("search"), value.get("selection") or {}
        draws = isinstance(search, dict) and search.get("sampler") == QUALITY_DIVERSITY
        if not draws or not isinstance(selection, dict) or "mode" in selection:
            return value
        return value | {"selection": {**selection, "mode": "every"}}

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_follow_the_pool(cls, value: Any) -> Any:
        """Methods, patience and pruning where the file names none."""
        if not isinstance(value, dict) or not isinstance(search := value.get("search") or {}, dict):
            return value
        settings = dict(search)
        if (methods := _default_methods(value)) is not None:
            settings.setdefault("methods", methods)
            if value.get("distil") is not False:
                settings.setdefault("patience", PATIENCE_BEFORE_DISTILLATION)
        if settings.get("pruning") is None:
            several = isinstance(settings.get("objective"), list | tuple) and len(settings["objective"]) > 1
            stepwise = any(_kind(task).has_predictions for task in _entries(value, "tasks").values())
            fits = settings.get("sampler", "tpe") in PRUNED_SAMPLERS and settings.get("anchor_examples") is None
            settings["pruning"] = "wilcoxon" if fits and stepwise and not several else "none"
        return value | {"search": settings}

    @model_validator(mode="after")
    def _names_agree(self) -> "Campaign":
        if BASE in self.members:
            raise ValueError(f"no member may be called '{BASE}'")
        for method in self.search.methods:
            require_known("search.methods", "method", method, METHODS)
            fixed = self.search.methods[method].scaling
            if fixed is not None and METHODS[method].scale_free and set(fixed.values) == {0}:
                raise ValueError(f"search.methods.{method}.scaling: factors of 0 only, which cancel: give one above 0")
            if method == "distilled":
                raise ValueError("search.methods: 'distilled' comes after the search: set `distil: {}` instead")
        if self.distil:
            for member in {*self.distil.temperatures, *self.distil.weights}:
                require_known("distil", "member", member, self.members)
        self.files_from.check(self.members)
        for task, member in self.task_heads.items():
            require_known("task_heads", "task", task, self.tasks)
            require_known("task_heads", "member", member, self.members)
        if self.base_data.task is not None:
            require_known("base_data.task", "task", self.base_data.task, self.tasks)
        for name, member_settings in self.members.items():
            if member_settings.task is not None:
                require_known(f"members.{name}.task", "task", member_settings.task, self.tasks)
        self._unseen_tasks_are_nobody_s()
        for subset in self.selection.subsets:
            if not subset or len(set(subset)) < len(subset):
                raise ValueError(f"selection.subsets: {list(subset)} must name members, each once")
            if strange := set(subset) - set(self.members):
                raise ValueError(f"selection.subsets: '{min(strange)}' is no member")
        if (gradient := self.search.gradient) is not None and gradient.start is not None:
            for member in gradient.start.recipe().members:
                require_known("search.gradient.start", "member", member, self.members)
        if self.selection.sizes is not None and not all(1 <= k <= len(self.members) for k in self.selection.sizes):
            raise ValueError(f"selection.sizes: sizes lie between 1 and {len(self.members)}, the number of members")
        self._examples_are_told_apart()
        self._search_can_start()
        greedy = self.greedy_method()
        if self.selection.mode.startswith("greedy") and not (
            greedy in self.search.methods and METHODS[greedy].most_members is None and METHODS[greedy].solution is None
        ):
            raise ValueError(
                f"selection.method: '{greedy}' must be one of search.methods that merges any subset of members"
            )
        if headless := [task for task in self.tasks if task not in self.owners()]:
            raise ValueError(
                f"no member has the task '{headless[0]}': give a member `task: {headless[0]}`, or name the member whose head "
                f"it uses under `task_heads`"
            )
        return self

    def _unseen_tasks_are_nobody_s(self) -> None:
        """Looks whether unseen tasks belong to no member, and have a head all the same."""
        for name in self.members:
            if (task := self.task_of(name)) in self.unseen():
                raise ValueError(
                    f"tasks.{task}: `role: unseen` is for data that belong to no member, and this is the task of '{name}': "
                    "leave the role out, or give the task another name"
                )
        if self.base_data.task in self.unseen():
            raise ValueError(f"base_data.task: '{self.base_data.task}' is unseen, so that no statistic may look at it")

    def unseen(self) -> list[str]:
        """Tasks that belong to no member."""
        return [name for name, task in self.tasks.items() if task.role == "unseen"]

    def _examples_are_told_apart(self) -> None:
        """Looks whether any task gives predictions of single examples, where the search asks for some of them."""
        setting = "anchor_examples" if self.search.anchor_examples else "pruning"
        wanted = self.search.anchor_examples or self.search.prunes
        if wanted and not any(TASKS[task.kind][0].has_predictions for task in self.tasks.values()):
            raise ValueError(f"search.{setting}: every task here is measured whole; leave it out")

    def _search_can_start(self) -> None:
        """Makes sampler and space once, for the errors that they raise."""
        try:
            if is_foreign(self.search.sampler):  # it is imported, or fetched, where a campaign is checked or run
                require_form(self.search.sampler)
            else:
                make_sampler(self.search.sampler, self.seed, self.search.sampler_arguments)
            own = {task for member in self.members if (task := self.task_of(member))}
            check_constraints(self.search.constraints, list(self.tasks), own)
            self._objectives_fit()
            # which groups there are depends on the pool's weights: here those that are named will do
            named = {key.partition(GROUP)[2] for spec in self.search.methods.values() for key in spec.scaling_of} - {""}
            groups = sorted(named) if self.search.scaling not in ("shared", "per_member") else []
            Space(self.search.methods, list(self.members), None, self.search.scaling, groups)
        except MergequestError as error:
            raise ValueError(str(error)) from error

    def _objectives_fit(self) -> None:
        settings, ones = self.search, dict.fromkeys(self.tasks, 1.0)
        try:
            unseen = self.unseen()
            names = make_objective(
                settings.objectives, list(self.tasks), ones, ones, settings.weights, None, unseen
            ).names
        except SettingsError as error:
            raise SettingsError(f"search.objective: {error}") from error
        if settings.weights and not {"weighted", f"{EXPECTED}weighted"} & set(names):
            raise SettingsError("search.weights go with `objective: weighted`")
        single = SINGLE_OBJECTIVE & {settings.sampler, settings.sampler_arguments.get("sampler")}
        if len(names) > 1 and single:
            raise SettingsError(
                f"sampler '{min(single)}' maximises one objective, not {len(names)}: use 'tpe' or 'nsga2', or name one"
            )

    def greedy_method(self) -> str:
        """The method that greedy selection merges with."""
        return self.selection.method or next(iter(self.search.methods))

    def task_of(self, member: str) -> str | None:
        """The task that a member was fine-tuned on; None where it has none here."""
        return self.members[member].task or (member if member in self.tasks else None)

    def source_of(self, member: str) -> str | None:
        """Name in `sources` of what a member's statistics are computed from; None where it has no examples."""
        return f"{member}{CALIBRATION}" if self.members[member].calibration else self.task_of(member)

    def sources(self) -> dict[str, tuple[AnyTaskSettings, str]]:
        """What statistics are computed from: name → settings, and the member whose head runs on it.

        Tasks, but those all of whose members have calibration data of their own, and these data.
        """
        own = {member for member, settings in self.members.items() if settings.calibration}
        replaced = {self.task_of(member) for member in own} - {self.task_of(member) for member in {*self.members} - own}
        owners = self.owners()
        left_out = {*replaced, *self.unseen()}
        tasks = {task: (settings, owners[task]) for task, settings in self.tasks.items() if task not in left_out}
        calibration = {f"{member}{CALIBRATION}": (self.members[member].calibration, member) for member in self.members}
        return tasks | {name: (settings, member) for name, (settings, member) in calibration.items() if settings}

    def owners(self) -> dict[str, str]:
        """Task → the member whose head it is evaluated with."""
        first_of: dict[str, str] = {}
        for member in self.members:
            if (task := self.task_of(member)) is not None:
                first_of.setdefault(task, member)
        for task in self.unseen():  # where all heads are merged, any will do: see `open_campaign`
            kind = self.tasks[task].kind
            alike = [owner for own, owner in first_of.items() if self.tasks[own].kind == kind]
            first_of.setdefault(task, next(iter(alike), ""))
        return {task: owner for task in self.tasks if (owner := self.task_heads.get(task, first_of.get(task, "")))}

    def identity(self) -> str:
        """Hash of what makes two runs the same campaign."""
        return hashing.fingerprint(self.lasting())

    def lasting(self) -> dict[str, Any]:
        """The settings that make two runs the same campaign: everything but budget, resources and place."""
        settings = self.model_dump(
            mode="json",
            exclude={
                "directory",
                "evaluation",
                "resources",
                "test",
                "files_from",
                "tracking",
                "environment",
                "training",
                "baselines",
            },
        )
        for budget in BUDGETS:
            settings["search"].pop(budget)
        if self.engine.kind == "transformers":
            settings.pop("engine")  # campaigns are older than engines
        settings["statistics"].pop("cache")
        return settings


def _entries(value: dict[str, Any], key: str) -> dict[str, Any]:
    """A section's entries that are themselves sections, of a file that is not checked yet."""
    section = value.get(key)
    entries = section.items() if isinstance(section, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict | BaseModel)}


def _setting(entry: Any, name: str, default: Any = None) -> Any:
    """A setting of an entry, be that checked or not."""
    return entry.get(name, default) if isinstance(entry, dict) else getattr(entry, name, default)


def _kind(task: Any) -> type[Task]:
    """The class of a task that is not checked yet; of an unknown kind, that of texts."""
    kind = _setting(task, "kind", "text_classification")
    return TASKS[kind][0] if isinstance(kind, str) and kind in TASKS else TASKS["text_classification"][0]


def _default_methods(value: dict[str, Any]) -> list[str] | None:
    """What a file that is not checked yet searches where it names no methods; None for those that need no data.

    Every member must have train examples of a kind of task that gives logits. Of language models no layer-by-layer solution
    is computed unasked: it takes as long as all else together, and on decoders RegMean keeps as much (docs/starts.md).
    """
    members, tasks = value.get("members"), _entries(value, "tasks")
    if not isinstance(members, dict) or not members:
        return None
    kinds = []
    for name, member in members.items():
        own = _setting(member, "calibration") if not isinstance(member, str) else None
        task = None if isinstance(member, str) else _setting(member, "task")
        source = own or tasks.get(str(task or name))
        data = _setting(source, "data") if source is not None else None
        if not isinstance(data, dict) or "train" not in data or not _kind(source).has_logits:
            return None
        kinds.append(_kind(source))
    writes = any(kind.is_generative for kind in kinds)
    return [name for name in WITH_DATA if not (writes and METHODS[name].solution)]


def load_campaign(path: str, overrides: Sequence[str] = (), *, to_be_made: bool = False) -> Campaign:
    """A campaign file with its defaults filled in and its paths made absolute, relative to the file.

    Args:
        path: The file.
        overrides: Settings in place of the file's, as `search.candidates=200`; paths in them are relative to the file, too.
        to_be_made: Whether members are yet to be trained: none of them is on the Hub.

    Raises:
        SettingsError: It is missing, or something in it is wrong: every mistake is in the message.
    """
    root = parent(path)
    campaign = validate(Campaign, with_overrides(load_yaml(path), overrides), path)
    settings = campaign.model_dump(mode="json")
    with said_in(path):
        settings["directory"] = resolve(campaign.directory or addresses.join("runs", campaign.name), root)
        resolve_pool(settings, root, to_be_made=to_be_made)
        settings["base_data"]["statistics"] = [resolve(file, root) for file in campaign.base_data.statistics]
        if settings["environment"]["working_dir"]:
            settings["environment"]["working_dir"] = resolve(settings["environment"]["working_dir"], root)
        for place in ("mlflow", "tensorboard"):
            if settings["tracking"][place]:
                settings["tracking"][place] = resolve(settings["tracking"][place], root)
        for section in ("statistics", "evaluation"):
            if settings[section]["cache"]:
                settings[section]["cache"] = resolve(settings[section]["cache"], root)
        calibration = [member["calibration"] for member in settings["members"].values() if member["calibration"]]
        resolve_data([*settings["tasks"].values(), *calibration], root)
    return validate(Campaign, settings, path)


def resolve_data(tasks: Iterable[dict[str, Any]], root: str) -> None:
    """Makes the paths of tasks' data absolute, relative to `root`; the settings as JSON has them are changed."""
    for task in tasks:
        if task.get("include_path"):
            task["include_path"] = resolve(task["include_path"], root)
        for split, files in task.get("data", {}).items():
            task["data"][split] = (
                resolve(files, root) if isinstance(files, str) else [resolve(file, root) for file in files]
            )


def dump(campaign: Campaign) -> str:
    """A campaign as a YAML file, every default spelled out."""
    return yaml.safe_dump(campaign.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
