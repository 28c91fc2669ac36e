"""The campaign file: one model that documents, checks and completes what a user asks for."""

from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from flows.settings import MemberSettings, Name, Settings, load_yaml, parent, resolve, validate
from merging import storage
from merging.descent import DescentSettings
from merging.distillation import DistillationSettings
from merging.errors import MergequestError, SettingsError
from merging.methods import BASE, METHODS
from merging.propagation import PropagationSettings
from merging.recipe import GROUP
from merging.registry import did_you_mean
from merging.statistics import (
    LikelihoodSettings,
    OutputGramSettings,
    RepresentationSettings,
    StatisticSettings,
)
from merging.tasks import TASKS, AnyTaskSettings
from search.candidate import Policy
from search.constraints import Constraint
from search.constraints import check as check_constraints
from search.method_space import Granularity, MethodSpace
from search.objective import EXPECTED, make_objective
from search.samplers import QUALITY_DIVERSITY, SAMPLERS, SINGLE_OBJECTIVE, make_sampler
from search.selection import Mode
from search.space import Space

CAMPAIGN_FILE = "campaign.yaml"
BUDGETS = (
    "candidates",
    "seconds",
    "budget_examples",
    "patience",
    "min_delta",
    "storage",
    "identical_errors",
    "candidate_seconds",
    "confirm",
)
"""Settings of the search that may change while a campaign stays the same."""
DEFAULT_METHODS = ("average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean")


class BaseData(Settings):
    """What the base itself learnt from: gradient_matching with `base_curvature: fisher` asks for the base's own Fisher."""

    task: str | None = Field(
        None,
        description="Task whose training examples are the base's own data; the base must have its own head for it.",
    )
    statistics: tuple[str, ...] = Field(
        (), description="Statistics files that somebody published for the base; used instead of data."
    )
    examples: int | None = Field(
        None, ge=1, description="Training examples behind the base; by default the training split of `task`."
    )


class StatisticsSettings(Settings):
    """How statistics are computed where no published file stands in for them."""

    fisher: LikelihoodSettings = Field(default_factory=LikelihoodSettings, description="Diagonal Fisher information.")
    gram: StatisticSettings = Field(
        default_factory=StatisticSettings, description="Gram matrices of layer inputs (RegMean)."
    )
    output_gram: OutputGramSettings = Field(
        default_factory=OutputGramSettings, description="Gram matrices of layer outputs' gradients (K-FAC)."
    )
    representation: RepresentationSettings = Field(
        default_factory=RepresentationSettings,
        description="Representations of examples, for the DPP's diversity.",
    )
    propagated: PropagationSettings = Field(
        default_factory=PropagationSettings, description="The layer-by-layer solution of regmean_propagated."
    )
    cache: str | None = Field(
        None,
        description="Directory of computed statistics, shared between campaigns; by default the campaign's own.",
    )
    shard: int = Field(64, ge=1, description="Examples that one Ray task computes; a lost worker costs one shard.")


class SelectionSettings(Settings):
    """Which subsets of members the search may choose among."""

    mode: Mode = Field(
        "dpp-map",
        description="dpp-map: the most diverse good subset of each size; dpp-sample: subsets drawn from a k-DPP; every: every "
        "subset of these sizes, or 256 drawn from the k-DPP where there are more (the default with the sampler "
        "quality_diversity); random: subsets drawn blindly; greedy-forward: the best member and those whose joining scores "
        "most on validation, up to N (N + 1) / 2 candidates of the budget; greedy-soup: from the best member down, those that "
        "do no harm, 2 N − 1 candidates; all: every member always; fixed: the subsets named here.",
    )
    sizes: tuple[int, ...] | None = Field(None, description="Sizes of subsets; by default every size from 2 to 16.")
    draws: int = Field(4, ge=1, description="Subsets drawn for each size (dpp-sample, random).")
    method: str | None = Field(
        None, description="Method whose defaults the greedy modes merge with; by default the first of search.methods."
    )
    subsets: tuple[tuple[str, ...], ...] = Field((), description="The subsets (fixed).")
    similarity: Literal["representation", "task-vector"] = Field(
        "representation",
        description="What S compares: representations of the same examples, or task vectors.",
    )
    centered: bool = Field(True, description="Centre representations, so that cosines tell members apart.")
    quality: Literal["gain", "equal"] = Field(
        "gain", description="q: relative gain over the base on the member's own task, or the same for all."
    )

    @model_validator(mode="after")
    def _fixed_has_subsets(self) -> "SelectionSettings":
        if (self.mode == "fixed") != bool(self.subsets):
            raise ValueError("`subsets` goes with `mode: fixed`, and `mode: fixed` needs `subsets`")
        return self


class GradientSettings(DescentSettings):
    """Gradient descent on scaling factors, from the defaults of methods that are linear in them."""

    methods: tuple[str, ...] = Field(
        (), description="Which of the search's methods; by default all that are linear in their factors."
    )

    def descent(self) -> DescentSettings:
        """What the descent itself is told."""
        return DescentSettings(**self.model_dump(exclude={"methods"}))


class SearchSettings(Settings):
    """What is tried, how it is judged, and when to stop."""

    methods: dict[str, MethodSpace] = Field(
        default_factory=lambda: {name: MethodSpace() for name in DEFAULT_METHODS},
        description="Methods to search over, each with overrides of its ranges; a list of names will do.",
        min_length=1,
    )
    candidates: int = Field(64, ge=1, description="Candidates to evaluate, the anchors among them.")
    seconds: float | None = Field(None, gt=0, description="Stop asking for candidates after this wall time.")
    budget_examples: int | None = Field(
        None, ge=1, description="Stop asking for candidates after so many evaluated examples, all tasks together."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many candidates in a row that did not improve the best one."
    )
    min_delta: float = Field(0.0, ge=0, description="An improvement is better by more than this (see patience).")
    scaling: Granularity = Field(
        "per_member",
        description="What has a scaling factor of its own: shared (all members have one), per_member, or every member in "
        "each group of weights: per_depth (groups of layers), per_layer, per_pattern (patterns of weights' names). Many free "
        "factors overfit validation.",
    )
    depth_groups: int = Field(4, ge=1, description="Into how many groups per_depth divides the layers, first to last.")
    patterns: tuple[str, ...] = Field(
        (), description="The groups of per_pattern (`*attention*`), no weight in two; the rest is one group more."
    )
    constraints: tuple[Constraint, ...] = Field(
        (),
        description="Bounds on tasks' scores, each {task: NAME, drop: 0.05} (at most so far below its own member) or "
        "{task: NAME, floor: 0.6}, without `task` for every task; candidates that keep them all come first.",
    )
    objective: str | tuple[str, ...] = Field(
        "mean",
        description="What is maximised over tasks: mean, worst, normalized (by each task's own member), weighted, or a "
        "task's name; with `expected_` before it, of 1 − expected error, which is smooth where a metric is flat. A list "
        "searches for the Pareto front; its first decides which candidate wins.",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="Task → weight in the objective weighted; those not named count nothing."
    )
    examples: int | None = Field(None, ge=1, description="Validation examples a task and candidate; by default all.")
    pruning: Policy = Field(
        "none",
        description="Which candidates are given up before all examples are measured: none; wilcoxon (clearly worse than the "
        "best so far, by a paired test); halving (not among the better half at 1, 2, 4, … steps). Anchors never are.",
    )
    examples_per_step: int | None = Field(
        None,
        ge=1,
        description="Examples of each task between two decisions; by default an eighth of the largest task (wilcoxon) or a "
        "quarter (halving).",
    )
    anchor_examples: int | None = Field(
        None,
        ge=2,
        description="Measure candidates on so many examples of each task, chosen by what base and members say of all, and "
        "estimate the rest; by default on all.",
    )
    confirm: int = Field(
        5,
        ge=1,
        description="With anchor_examples: the best candidates that are then measured on everything, beside the best of each "
        "method; the winner is one of them.",
    )
    candidate_seconds: float | None = Field(
        None,
        gt=0,
        description="Wall time of one candidate, its method's preparation included; beyond it the candidate has failed, and "
        "its evaluator is replaced.",
    )
    theory: bool = Field(
        True,
        description="Where a method is linear in its factors, and members have Fisher or Gram statistics: begin with the "
        "factors that minimise the quadratic model of all losses, and keep its prediction in the ledger (`proxies`).",
    )
    gradient: GradientSettings | None = Field(
        None, description="Begin with scaling factors found by gradient descent on validation; `{}` for its defaults."
    )
    sampler: str = Field(
        "tpe", description="Optuna sampler: " + ", ".join(sorted(SAMPLERS)) + " (ours: subsets from a k-DPP)."
    )
    sampler_arguments: dict[str, Any] = Field(default_factory=dict, description="Its arguments, as Optuna names them.")
    history: int | None = Field(
        500,
        ge=100,
        description="How many finished candidates the samplers tpe and gp see, the best and the latest: their proposals take "
        "longer with each; null for all.",
    )
    storage: str | None = Field(
        None,
        description="Optuna storage URL, without a password (PostgreSQL reads `PGPASSWORD` or `~/.pgpass`); by default a "
        "journal file in the directory.",
    )
    identical_errors: int = Field(5, ge=1, description="Stop after this many equal errors in a row.")

    @model_validator(mode="before")
    @classmethod
    def _list_of_methods(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("methods"), list | tuple):
            return value | {"methods": {name: {} for name in value["methods"]}}
        if isinstance(value, dict) and isinstance(value.get("methods"), dict):
            return value | {"methods": {name: spec or {} for name, spec in value["methods"].items()}}
        return value

    @model_validator(mode="after")
    def _no_password(self) -> "SearchSettings":
        if self.storage is not None and storage.holds_secret(self.storage):
            raise ValueError(
                "storage: the URL holds a password, which would be saved with the campaign: leave it out, and give it by "
                "PGPASSWORD, ~/.pgpass or the database's own option file"
            )
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is maximised; the first decides which candidate wins."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @model_validator(mode="after")
    def _one_way_to_save(self) -> "SearchSettings":
        if self.pruning != "none" and self.anchor_examples is not None:
            raise ValueError("`pruning` and `anchor_examples` do not go together: choose one")
        if self.pruning != "none" and not isinstance(self.objective, str) and len(self.objective) > 1:
            raise ValueError("`pruning` compares candidates by one objective, and there are several: set it to none")
        return self

    @model_validator(mode="after")
    def _patterns_go_with_per_pattern(self) -> "SearchSettings":
        if (self.scaling == "per_pattern") != bool(self.patterns):
            raise ValueError("`patterns` goes with `scaling: per_pattern`, which needs them")
        return self


class ResourceSettings(Settings):
    """What the campaign takes of the machine or cluster; by default all of it, without crowding it."""

    evaluators: int | None = Field(
        None, ge=1, description="Evaluators at work at once; by default one a GPU, or a core."
    )
    threads: int = Field(1, ge=1, description="Torch threads of each process; more than one seldom pays on few cores.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of an evaluator (fractions share one); by default 1 if any."
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GB that an evaluator asks its node for, so that no more of them start there than fit; by default nothing "
        "is asked for.",
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of evaluation; bfloat16 is autocast.")
    regime: Literal["auto", "resident", "sharded"] = Field(
        "auto",
        description="Where candidates are merged: resident (base and members lie in every evaluator), sharded (once in "
        "the memory of the nodes, in shards, which send evaluators what they merged); auto is sharded where an evaluator has "
        "no room for them.",
    )
    shards: int | None = Field(
        None, ge=1, description="Shards of the sharded regime; by default one a node, or more where memory asks for it."
    )
    shard_memory: float | None = Field(
        None, gt=0, description="Most memory of a shard in GB; by default four fifths of the smallest node's."
    )
    retries: int = Field(3, ge=0, description="How often work is tried again after a worker was lost.")


class DistilSettings(DistillationSettings):
    """A last step after the search, without labels: the members' outputs are distilled into all weights of the winner."""


class TestSettings(Settings):
    """The last measurement, read once."""

    __test__ = False
    top: int = Field(3, ge=1, description="Runners-up measured on test beside the winner, the winner included.")


class Campaign(Settings):
    """A campaign file."""

    name: Name = Field(description="Names the campaign in the ledger and on a shared cluster.")
    directory: str | None = Field(
        None, description="What the campaign fills; by default `runs/<name>` beside this file."
    )
    base: str = Field(description="The checkpoint that all members were fine-tuned from.")
    members: dict[Name, MemberSettings] = Field(
        min_length=1, description="The pool: checkpoints by name (a path alone will do)."
    )
    base_data: BaseData = Field(default_factory=BaseData, description=BaseData.__doc__)
    heads: tuple[str, ...] = Field(
        (),
        description="Patterns (classifier.*) of tensors to keep per task though base and members all have them.",
    )
    tasks: dict[Name, AnyTaskSettings] = Field(min_length=1, description="What a merge is judged by.")
    task_heads: dict[str, str] = Field(
        default_factory=dict,
        description="Task → member whose head it uses, where no member names the task as its own.",
    )
    statistics: StatisticsSettings = Field(default_factory=StatisticsSettings, description=StatisticsSettings.__doc__)
    selection: SelectionSettings = Field(default_factory=SelectionSettings, description=SelectionSettings.__doc__)
    search: SearchSettings = Field(default_factory=SearchSettings, description=SearchSettings.__doc__)
    distil: DistilSettings | None = Field(
        None,
        description="Distil the members' outputs on their train inputs into the winner, no labels; `{}` for its defaults. It "
        "is measured and reported beside the merge that it started from.",
    )
    test: TestSettings = Field(default_factory=TestSettings, description=TestSettings.__doc__)
    resources: ResourceSettings = Field(default_factory=ResourceSettings, description=ResourceSettings.__doc__)
    seed: int = Field(0, ge=0, description="Of sampler, selection and sampled statistics.")

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

    @model_validator(mode="after")
    def _names_agree(self) -> "Campaign":
        if BASE in self.members:
            raise ValueError(f"no member may be called '{BASE}'")
        for method in self.search.methods:
            if method not in METHODS:
                raise ValueError(f"search.methods: unknown method '{method}'. {did_you_mean(method, list(METHODS))}")
            if method == "distilled":
                raise ValueError("search.methods: 'distilled' comes after the search: set `distil: {}` instead")
        for task, member in self.task_heads.items():
            if task not in self.tasks:
                raise ValueError(f"task_heads: unknown task '{task}'. {did_you_mean(task, list(self.tasks))}")
            if member not in self.members:
                raise ValueError(f"task_heads: unknown member '{member}'. {did_you_mean(member, list(self.members))}")
        if self.base_data.task is not None and self.base_data.task not in self.tasks:
            hint = did_you_mean(self.base_data.task, list(self.tasks))
            raise ValueError(f"base_data.task: unknown task '{self.base_data.task}'. {hint}")
        for name, member_settings in self.members.items():
            if member_settings.task is not None and member_settings.task not in self.tasks:
                hint = did_you_mean(member_settings.task, list(self.tasks))
                raise ValueError(f"members.{name}.task: unknown task '{member_settings.task}'. {hint}")
        for subset in self.selection.subsets:
            if strange := set(subset) - set(self.members):
                raise ValueError(f"selection.subsets: '{min(strange)}' is no member")
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

    def _examples_are_told_apart(self) -> None:
        """Looks whether any task gives outcomes of single examples, where the search asks for some of them."""
        asked = "anchor_examples" if self.search.anchor_examples else "pruning"
        wanted = self.search.anchor_examples or self.search.pruning != "none"
        if wanted and not any(TASKS[task.kind][0].has_outcomes for task in self.tasks.values()):
            raise ValueError(f"search.{asked}: every task here is measured whole; leave it out")

    def _search_can_start(self) -> None:
        """Makes sampler and space once, for the errors that they raise."""
        try:
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
            names = make_objective(settings.objectives, list(self.tasks), ones, ones, settings.weights).names
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

    def owners(self) -> dict[str, str]:
        """Task → the member whose head it is evaluated with."""
        found: dict[str, str] = {}
        for member in self.members:
            if (task := self.task_of(member)) is not None:
                found.setdefault(task, member)
        return {task: owner for task in self.tasks if (owner := self.task_heads.get(task, found.get(task, "")))}

    def identity(self) -> str:
        """Hash of what makes two runs the same campaign: everything but budget, resources and place."""
        settings = self.model_dump(mode="json", exclude={"directory", "resources", "test"})
        for budget in BUDGETS:
            settings["search"].pop(budget)
        settings["statistics"].pop("cache")
        return storage.fingerprint(settings)


def load_campaign(path: str) -> Campaign:
    """A campaign file with its defaults filled in and its paths made absolute, relative to the file.

    Raises:
        SettingsError: It is missing, or something in it is wrong: every mistake is in the message.
    """
    root = parent(path)
    campaign = validate(Campaign, load_yaml(path), path)
    settings = campaign.model_dump(mode="json")
    settings["directory"] = resolve(campaign.directory or storage.join("runs", campaign.name), root)
    settings["base"] = resolve(campaign.base, root)
    for member in settings["members"].values():
        member["checkpoint"] = resolve(member["checkpoint"], root)
        member["statistics"] = [resolve(file, root) for file in member["statistics"]]
    settings["base_data"]["statistics"] = [resolve(file, root) for file in campaign.base_data.statistics]
    if settings["statistics"]["cache"]:
        settings["statistics"]["cache"] = resolve(settings["statistics"]["cache"], root)
    for task in settings["tasks"].values():
        for split, files in task.get("data", {}).items():
            task["data"][split] = (
                resolve(files, root) if isinstance(files, str) else [resolve(file, root) for file in files]
            )
    return validate(Campaign, settings, path)


def dump(campaign: Campaign) -> str:
    """A campaign as a YAML file, every default spelled out."""
    return yaml.safe_dump(campaign.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
