"""The campaign file's section on the search: what is tried, how it is judged, and when to stop."""

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from flows.config.yaml_file import Settings
from merging.errors import MethodError
from merging.mergers.linear_basis import is_linear
from merging.methods import METHODS
from merging.optimization.descent import DescentSettings
from merging.recipe import Recipe, Value, flat
from search.candidate import Policy
from search.constraints import Constraint
from search.samplers.make_sampler import SAMPLERS
from search.space.method_space import Granularity, MethodSpace

WITH_DATA = ("regmean_propagated", "esm", "regmean", "fisher", "ace", "tsv_m", "task_arithmetic")
"""Methods where every member has calibration data: the strongest label-free merges."""
WITHOUT_DATA = ("average", "ace", "tsv_m", "task_arithmetic", "ties")
"""Methods that know of the members their weights alone."""
PATIENCE = 12
PATIENCE_BEFORE_DISTILLATION = 6
"""Where the members have calibration data: the baselines are strong, and what points are left distillation finds."""
PRUNED_SAMPLERS = ("tpe", "random", "gp", "quality_diversity")
"""Samplers that learn from candidates that were given up."""


class GradientStart(Settings):
    """A recipe to follow the gradient from, in the words of its own file (`recipe.yaml`)."""

    method: str = Field(description="One of the search's methods, linear in its scaling factors.")
    scaling: dict[str, float | dict[str, float]] = Field(
        description="Member → its factor, or one for each of its groups of weights; members that are not named take no part.",
        min_length=1,
    )
    parameters: dict[str, Value] = Field(default_factory=dict, description="The method's parameters.")

    def recipe(self) -> Recipe:
        """The recipe itself, with no more parameters than are given: some defaults follow the base's architecture.

        Raises:
            MethodError: Method, parameter or value is unknown or out of bounds, or the method is not linear.
        """
        given = Recipe(self.method, flat(self.scaling), self.parameters)
        complete = METHODS[self.method].complete(given)
        if not is_linear(complete):
            raise MethodError(
                f"'{self.method}' is not linear in its scaling factors, so that there is no gradient to follow"
            )
        return replace(complete, parameters={name: complete.parameters[name] for name in self.parameters})


class GradientSettings(DescentSettings):
    """Gradient descent on scaling factors, from the defaults of methods that are linear in them, or from any recipe."""

    methods: tuple[str, ...] = Field(
        (),
        description="Which of the search's methods that are linear in their factors; by default the one that knows most of "
        "the members (RegMean before task arithmetic).",
    )

    start: GradientStart | None = Field(
        None, description="A recipe to start from instead, another campaign's winner for instance."
    )

    def descent(self) -> DescentSettings:
        """What the descent itself is told."""
        return DescentSettings(**self.model_dump(exclude={"methods", "start"}))


class SearchSettings(Settings):
    """What is tried, how it is judged, and when to stop."""

    methods: dict[str, MethodSpace] = Field(
        default_factory=lambda: {name: MethodSpace() for name in WITHOUT_DATA},
        description="Methods to search over, each with overrides of its ranges; a list of names will do. By default "
        + ", ".join(WITH_DATA)
        + " where every member has calibration data (of language models without the first), and else "
        + ", ".join(WITHOUT_DATA)
        + ".",
        min_length=1,
    )
    candidates: int = Field(64, ge=1, description="Candidates to evaluate, the baselines among them.")
    seconds: float | None = Field(
        None, gt=0, description="Stop asking for candidates after this wall time, that of earlier runs included."
    )
    budget_examples: int | None = Field(
        None, ge=1, description="Stop asking for candidates after so many evaluated examples, all tasks together."
    )
    gpu_hours: float | None = Field(
        None,
        gt=0,
        description="Stop asking for candidates after so many GPU hours of them, those of earlier runs included (the ledger's "
        "`gpu_hours`).",
    )
    cpu_hours: float | None = Field(None, gt=0, description="The same of CPU hours.")
    patience: int | None = Field(
        PATIENCE,
        ge=1,
        description="Stop after so many proposals in a row, once the baselines are measured, that did not improve the best "
        f"candidate by `min_delta`; null for never. By default {PATIENCE_BEFORE_DISTILLATION} where every member has "
        "calibration data and `distil` is not false.",
    )
    min_delta: float | None = Field(
        None,
        ge=0,
        description="An improvement is better by more than this; by default by what validation can see: twice the standard "
        "error of the best baseline's difference from those behind it, example by example.",
    )
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
        description="What is maximised over tasks: mean, worst, normalized (by each task's own member), weighted, unseen (mean "
        "over tasks of `role: unseen`, which the others leave out), or a task's name; with `expected_` before it, of 1 − "
        "expected error, which is smooth where a metric is flat. A list searches for the Pareto front; its first decides which "
        "candidate wins.",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="Task → weight in the objective weighted; those not named count nothing."
    )
    examples: int | None = Field(None, ge=1, description="Validation examples per task and candidate; by default all.")
    pruning: Policy | None = Field(
        None,
        description="Which candidates are given up before all examples are measured: none; wilcoxon (clearly worse than the "
        "best so far, by a paired test); halving (not among the better half at 1, 2, 4, … steps). Baselines never are. By "
        "default wilcoxon, but none with several objectives, `anchor_examples`, tasks that are measured whole, or a sampler "
        "other than " + ", ".join(PRUNED_SAMPLERS) + ".",
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
    line_search: bool = Field(
        True,
        description="Before the sampler proposes, measure the best baseline with its factors times 1.25, 1.5, 2, 3 and 0.75, "
        "0.5, in each direction as long as that helps.",
    )
    theory: bool = Field(
        False,
        description="Where a method is linear in its factors, and members have Fisher or Gram statistics: keep in the ledger "
        "what the quadratic model of the losses predicts (`proxies`).",
    )
    theory_starts: bool = Field(
        False,
        description="Predict as with `theory`, and begin with the factors that minimise the prediction. They lower the loss, "
        "and seldom raise accuracy (docs/starts.md).",
    )
    gradient: GradientSettings | None = Field(
        None, description="Begin with scaling factors found by gradient descent on validation; `{}` for its defaults."
    )
    sampler: str = Field(
        "tpe",
        description="Optuna sampler: " + ", ".join(sorted(SAMPLERS)) + " (ours: subsets from a k-DPP)."
        " Or any other: `optunahub:samplers/NAME` (needs mergequest[optunahub], a network), or `module:attribute`, a class or "
        "a function of yours; it is made once a run, with the campaign's seed where it takes one.",
    )
    sampler_arguments: dict[str, Any] = Field(default_factory=dict, description="Its arguments, as Optuna names them.")
    history: int | None = Field(
        500,
        ge=100,
        description="How many finished candidates the samplers tpe, gp and quality_diversity see, the best and the latest: "
        "their proposals take longer with each; null for all. The others see what they need: nsga2, nsga3 and cmaes their last "
        "two generations, qmc one candidate with each parameter.",
    )
    identical_errors: int = Field(5, ge=1, description="Stop after this many equal errors in a row.")

    @model_validator(mode="before")
    @classmethod
    def _storage_is_the_ledger(cls, value: Any) -> Any:
        """Files that earlier versions wrote say `storage: null`."""
        if not isinstance(value, dict) or "storage" not in value:
            return value
        if value["storage"] is not None:
            raise ValueError(
                "storage: the study is made of the ledger, and kept nowhere else: leave it out, and look at it by "
                "`mergequest dashboard DIRECTORY`"
            )
        return {name: entry for name, entry in value.items() if name != "storage"}

    @model_validator(mode="before")
    @classmethod
    def _list_of_methods(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("methods"), list | tuple):
            if not all(isinstance(name, str) for name in value["methods"]):
                raise ValueError(
                    "methods: expected a list of names, or a mapping of names to what is to be tried of them"
                )
            return value | {"methods": {name: {} for name in value["methods"]}}
        if isinstance(value, dict) and isinstance(value.get("methods"), dict):
            return value | {"methods": {name: spec or {} for name, spec in value["methods"].items()}}
        return value

    @property
    def prunes(self) -> bool:
        """Whether candidates are given up early; where the file says nothing, a campaign decides it."""
        return self.pruning not in (None, "none")

    @property
    def predicts(self) -> bool:
        """Whether quadratic models are made of the losses."""
        return self.theory or self.theory_starts

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is maximised; the first decides which candidate wins."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @model_validator(mode="after")
    def _one_way_to_save(self) -> "SearchSettings":
        if self.prunes and self.anchor_examples is not None:
            raise ValueError("`pruning` and `anchor_examples` do not go together: choose one")
        if self.prunes and len(self.objectives) > 1:
            raise ValueError("`pruning` compares candidates by one objective, and there are several: set it to none")
        return self

    @model_validator(mode="after")
    def _gradient_starts_in_the_search(self) -> "SearchSettings":
        if self.gradient is None or self.gradient.start is None:
            return self
        if self.gradient.start.method not in self.methods:
            raise ValueError(f"gradient.start: '{self.gradient.start.method}' is none of the search's methods")
        try:
            self.gradient.start.recipe()
        except MethodError as error:
            raise ValueError(f"gradient.start: {error}") from error
        return self

    @model_validator(mode="after")
    def _patterns_go_with_per_pattern(self) -> "SearchSettings":
        if (self.scaling == "per_pattern") != bool(self.patterns):
            raise ValueError("`patterns` goes with `scaling: per_pattern`, which needs them")
        return self
