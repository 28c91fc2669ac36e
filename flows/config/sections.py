"""The sections of the campaign file but the search: data, statistics, selection, resources, and what comes at the end."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flows.config.yaml_file import Settings
from merging.optimization.distillation_settings import DistillationSettings
from merging.propagation import PropagationSettings
from merging.statistics import GramSettings, LikelihoodSettings, OutputGramSettings, RepresentationSettings
from merging.tasks.environment import secret_in
from search.subsets.choose_subsets import Mode


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
    gram: GramSettings = Field(default_factory=GramSettings, description="Gram matrices of layer inputs (RegMean).")
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
        description="Directory of computed statistics, shared between campaigns; by default the campaign's own. Statistics "
        "computed anew may differ in their last bits: which process sums which examples is left to chance.",
    )
    shard: int = Field(
        64, ge=1, description="Examples computed at a time; a lost process costs the shards in its part of the sum."
    )


PAPER: Mapping[str, Any] = {
    "similarity": "representation",
    "examples": "validation",
    "centered": False,
    "quality": "gain",
    "norm": "unit",
}
"""The kernel L as the paper on quality and diversity has it."""


class SelectionSettings(Settings):
    """Which subsets of members the search may choose among."""

    mode: Mode = Field(
        "dpp-map",
        description="dpp-map: the most diverse good subset of each size; dpp-sample: subsets drawn from a k-DPP; every: every "
        "subset of these sizes, or 256 drawn from the k-DPP where there are more (the default with the sampler "
        "quality_diversity); random: subsets drawn blindly; greedy-forward: the best member and those whose joining scores "
        "most on validation, up to N (N + 1) / 2 candidates of the budget; greedy-soup: from the best member down, those that "
        "do no harm, 2 N − 1 candidates; greedy-ranked: the best member, the best two and so on by what each scores alone, "
        "N candidates; all: every member always; fixed: the subsets named here.",
    )
    sizes: tuple[int, ...] | None = Field(
        None, min_length=1, description="Sizes of subsets; by default every size from 2 to 16."
    )
    draws: int = Field(4, ge=1, description="Subsets drawn for each size (dpp-sample, random).")
    method: str | None = Field(
        None, description="Method whose defaults the greedy modes merge with; by default the first of search.methods."
    )
    subsets: tuple[tuple[str, ...], ...] = Field((), description="The subsets (fixed).")
    similarity: Literal["representation", "task-vector"] = Field(
        "representation",
        description="What S compares: representations of the same examples, or task vectors.",
    )
    examples: Literal["train", "validation"] = Field(
        "train", description="Whose representations are compared: of training or of validation examples."
    )
    centered: bool = Field(True, description="Centre representations, so that cosines tell members apart.")
    quality: Literal["gain", "equal"] = Field(
        "gain", description="q: relative gain over the base on the member's own task, or the same for all."
    )
    norm: Literal["none", "unit"] = Field(
        "none",
        description="unit: q is divided by its norm in L = diag(q) S diag(q), which shifts log det alike for all of a size "
        "and changes no selection of a given size.",
    )
    kernel: Literal["own", "paper"] = Field(
        "own",
        description="paper: S and L as the paper on quality and diversity has them (similarity: representation, examples: "
        "validation, centered: false, quality: gain, norm: unit).",
    )

    @model_validator(mode="before")
    @classmethod
    def _kernel_of_the_paper(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("kernel") != "paper":
            return given
        if other := [key for key, value in PAPER.items() if given.get(key, value) != value]:
            raise ValueError(f"`kernel: paper` has {other[0]}: {PAPER[other[0]]}; leave one of the two out")
        return {**given, **PAPER}

    @model_validator(mode="after")
    def _fixed_has_subsets(self) -> "SelectionSettings":
        if (self.mode == "fixed") != bool(self.subsets):
            raise ValueError("`subsets` goes with `mode: fixed`, and `mode: fixed` needs `subsets`")
        return self


class EvaluationSettings(Settings):
    """How candidates are measured."""

    cache: str | None = Field(
        None,
        description="Directory of what candidates said of single examples, shared between campaigns: a candidate of the same "
        "content, measured with the same settings on the same data, is not measured again (docs/ledger.md). By default nothing "
        "is kept beside the ledger.",
    )


class ResourceSettings(Settings):
    """CPU, GPU and memory limits; by default the whole machine or cluster."""

    evaluators: int | None = Field(
        None, ge=1, description="Evaluators at work at once; by default one per GPU, or per core."
    )
    threads: int = Field(1, ge=1, description="Torch threads of each process; more than one seldom pays on few cores.")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of an evaluator (fractions share one); by default 1 if any, or engine.tensor_parallel. Over several, "
        "a model's layers are spread (needs mergequest[accelerate]), or an engine's matrices. Statistics and distillation have "
        "one at most.",
    )
    accelerator_type: str | None = Field(
        None,
        description="Ray's name of the GPUs that evaluators, statistics and distillation ask for (A100, H100); by default any.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels (`ray start --labels`) of the nodes that these are started on.",
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="GB that an evaluator asks its node for, so that no more of them start there than fit; by default nothing "
        "is asked for.",
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Of evaluation; bfloat16 is autocast; auto: bfloat16 where every evaluator's hardware has it, it is "
        "faster, and the plain average, measured in both, scores the same: within twice the paired standard error.",
    )
    dtype: Literal["own", "float32"] = Field(
        "own",
        description="Of the models that are scored: the checkpoints' own (bfloat16, float16), or float32 at twice the memory. "
        "Either way they hold the weights that are exported, rounded to the base's dtype.",
    )
    regime: Literal["auto", "resident", "sharded"] = Field(
        "auto",
        description="Where candidates are merged: resident (base and members lie in every evaluator), sharded (once in "
        "the memory of the nodes, in shards, which send evaluators what they merged); auto is sharded where an evaluator has "
        "no room for them.",
    )
    shards: int | None = Field(
        None,
        ge=1,
        description="Shards of the sharded regime; by default one per node, or more where memory asks for it.",
    )
    shard_memory: float | None = Field(
        None, gt=0, description="Most memory of a shard in GB; by default four fifths of the smallest node's."
    )
    transport: Literal["store", "nixl"] = Field(
        "store",
        description="How merged weights come from shards to evaluators: through Ray's object store, or written straight into "
        "the evaluators' memory through NIXL (by RDMA, shared memory or TCP; every node needs mergequest[nixl]).",
    )
    retries: int = Field(3, ge=0, description="How often work is tried again after a worker was lost.")

    @model_validator(mode="after")
    def _shares_of_one_gpu(self) -> "ResourceSettings":
        if self.gpus is not None and self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError("gpus: a share of one GPU (below 1), or whole GPUs")
        return self


Baseline = Literal["ensemble", "all_data", "fine_tuned"]
"""What merges are compared with, beside base and members."""


class DistilSettings(DistillationSettings):
    """After the search, without labels: the members' outputs on their own inputs are distilled into the best merge."""


class EnvironmentSettings(Settings):
    """What workers on the cluster have besides their nodes' own environment."""

    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of workers. `${NAME}` stands for what the driver's environment holds, which is "
        "never saved or shown; secrets written out are refused.",
    )
    pip: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        (), description="Packages that every node installs for the campaign (Ray's `pip`)."
    )
    working_dir: str | None = Field(
        None,
        description="Local directory that is sent to every node, with the modules of custom evaluators in it (Ray's "
        "`working_dir`); `submit` sends such modules and what they import of the working directory by itself.",
    )

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in env if not re.fullmatch(r"[^\s=\0]+", name) or "\0" in env[name]]:
            raise ValueError(f"{wrong[0]!r} cannot be set: a name has no blank and no =, and a value no NUL character")
        return env

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        if (place := secret_in(env)) is not None:
            raise ValueError(
                f"'{place}' looks like a secret, which would be saved with the campaign: write ${{{place}}} instead, and set "
                "it where the campaign is started"
            )
        return env


class TrackingSettings(Settings):
    """A team's own trackers: they get every row of the ledger as it comes, and the winner's report and recipe at the end."""

    mlflow: str | None = Field(
        None, description="MLflow's tracking URI (`http://HOST:5000`), or a directory. Needs mergequest[mlflow]."
    )
    experiment: str | None = Field(None, description="MLflow's experiment; by default the campaign's name.")
    wandb: str | None = Field(
        None,
        description="Weights & Biases' `PROJECT` or `ENTITY/PROJECT`; its key is WANDB_API_KEY's, and WANDB_MODE=offline "
        "keeps the run in the directory. Needs mergequest[wandb].",
    )
    tensorboard: str | None = Field(
        None,
        description="Directory of TensorBoard's event files, one below it per campaign. Needs mergequest[tensorboard].",
    )


class TestSettings(Settings):
    """The last measurement, read once."""

    __test__ = False
    top: int = Field(
        3,
        ge=1,
        description="Runners-up measured on test beside the winner, the winner included; of twins (one method, the same "
        "members, scores within their standard errors) only the best.",
    )
