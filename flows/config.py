"""The campaign file: one model that documents, checks and completes what a user asks for."""

import os
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merging import storage
from merging.errors import MergequestError, SettingsError
from merging.methods import BASE, METHODS
from merging.propagation import PropagationSettings
from merging.registry import did_you_mean
from merging.statistics import (
    LikelihoodSettings,
    OutputGramSettings,
    RepresentationSettings,
    StatisticSettings,
)
from merging.tasks import AnyTaskSettings
from search.objective import OBJECTIVES
from search.samplers import SAMPLERS, make_sampler
from search.space import MethodSpace, Space

CAMPAIGN_FILE = "campaign.yaml"
DEFAULT_METHODS = ("average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean")
Model = TypeVar("Model", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Settings(BaseModel):
    """A section of the campaign file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MemberSettings(Settings):
    """A checkpoint fine-tuned from the base."""

    checkpoint: str = Field(description="Hugging Face model directory (config.json + safetensors).")
    statistics: tuple[str, ...] = Field(
        (), description="Statistics files that somebody published for this checkpoint; used instead of data."
    )
    task: str | None = Field(None, description="The task it was fine-tuned on; by default the task of its own name.")
    examples: int | None = Field(
        None,
        ge=1,
        description="Training examples behind it (gradient matching); by default its task's training split.",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"checkpoint": value} if isinstance(value, str) else value


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

    mode: Literal["dpp-map", "dpp-sample", "all", "fixed"] = Field(
        "dpp-map",
        description="dpp-map: the most diverse good subset of each size; dpp-sample: subsets drawn from a k-DPP; all: every "
        "member always; fixed: the subsets named here.",
    )
    sizes: tuple[int, ...] | None = Field(None, description="Sizes of subsets; by default every size from 2.")
    draws: int = Field(4, ge=1, description="Subsets drawn for each size (dpp-sample).")
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


class SearchSettings(Settings):
    """What is tried, how it is judged, and when to stop."""

    methods: dict[str, MethodSpace] = Field(
        default_factory=lambda: {name: MethodSpace() for name in DEFAULT_METHODS},
        description="Methods to search over, each with overrides of its ranges; a list of names will do.",
        min_length=1,
    )
    candidates: int = Field(64, ge=1, description="Candidates to evaluate, the anchors among them.")
    seconds: float | None = Field(None, gt=0, description="Stop asking for candidates after this wall time.")
    scaling: Literal["shared", "per_member"] = Field("per_member", description="One scaling factor, or one a member.")
    objective: str = Field(
        "mean", description="What is maximised over tasks: mean, worst, normalized, or a task's name."
    )
    examples: int | None = Field(None, ge=1, description="Validation examples a task and candidate; by default all.")
    sampler: str = Field("tpe", description="Optuna sampler: " + ", ".join(sorted(SAMPLERS)) + ".")
    sampler_arguments: dict[str, Any] = Field(default_factory=dict, description="Its arguments, as Optuna names them.")
    storage: str | None = Field(None, description="Optuna storage URL; by default a journal file in the directory.")
    identical_errors: int = Field(5, ge=1, description="Stop after this many equal errors in a row.")

    @model_validator(mode="before")
    @classmethod
    def _list_of_methods(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("methods"), list | tuple):
            return value | {"methods": {name: {} for name in value["methods"]}}
        if isinstance(value, dict) and isinstance(value.get("methods"), dict):
            return value | {"methods": {name: spec or {} for name, spec in value["methods"].items()}}
        return value


class ResourceSettings(Settings):
    """What the campaign takes of the machine or cluster; by default all of it, without crowding it."""

    evaluators: int | None = Field(
        None, ge=1, description="Evaluators at work at once; by default one a GPU, or a core."
    )
    threads: int = Field(1, ge=1, description="Torch threads of each process; more than one seldom pays on few cores.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of an evaluator (fractions share one); by default 1 if any."
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of evaluation; bfloat16 is autocast.")
    retries: int = Field(3, ge=0, description="How often work is tried again after a worker was lost.")


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
    test: TestSettings = Field(default_factory=TestSettings, description=TestSettings.__doc__)
    resources: ResourceSettings = Field(default_factory=ResourceSettings, description=ResourceSettings.__doc__)
    seed: int = Field(0, ge=0, description="Of sampler, selection and sampled statistics.")

    @model_validator(mode="after")
    def _names_agree(self) -> "Campaign":
        if BASE in self.members:
            raise ValueError(f"no member may be called '{BASE}'")
        for method in self.search.methods:
            if method not in METHODS:
                raise ValueError(f"search.methods: unknown method '{method}'. {did_you_mean(method, list(METHODS))}")
        for task, member in self.task_heads.items():
            if task not in self.tasks:
                raise ValueError(f"task_heads: unknown task '{task}'. {did_you_mean(task, list(self.tasks))}")
            if member not in self.members:
                raise ValueError(f"task_heads: unknown member '{member}'. {did_you_mean(member, list(self.members))}")
        for name, member_settings in self.members.items():
            if member_settings.task is not None and member_settings.task not in self.tasks:
                hint = did_you_mean(member_settings.task, list(self.tasks))
                raise ValueError(f"members.{name}.task: unknown task '{member_settings.task}'. {hint}")
        for subset in self.selection.subsets:
            if strange := set(subset) - set(self.members):
                raise ValueError(f"selection.subsets: '{min(strange)}' is no member")
        if self.selection.sizes is not None and not all(1 <= k <= len(self.members) for k in self.selection.sizes):
            raise ValueError(f"selection.sizes: sizes lie between 1 and {len(self.members)}, the number of members")
        known = [*OBJECTIVES, *self.tasks]
        if self.search.objective not in known:
            raise ValueError(
                f"search.objective: unknown '{self.search.objective}'. {did_you_mean(self.search.objective, known)}"
            )
        self._search_can_start()
        if headless := [task for task in self.tasks if task not in self.owners()]:
            raise ValueError(
                f"no member has the task '{headless[0]}': give a member `task: {headless[0]}`, or name the member whose head "
                f"it uses under `task_heads`"
            )
        return self

    def _search_can_start(self) -> None:
        """Makes sampler and space once, for the errors that they raise."""
        try:
            make_sampler(self.search.sampler, self.seed, self.search.sampler_arguments)
            Space(self.search.methods, list(self.members), None, self.search.scaling)
        except MergequestError as error:
            raise ValueError(str(error)) from error

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
        for budget in ("candidates", "seconds", "storage", "identical_errors"):
            settings["search"].pop(budget)
        settings["statistics"].pop("cache")
        return storage.fingerprint(settings)


def load_yaml(path: str) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        SettingsError: It is missing, no YAML, or no mapping.
    """
    try:
        value = yaml.safe_load(storage.read_text(path))
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    except MergequestError as error:
        raise SettingsError(str(error)) from error
    if not isinstance(value, dict):
        raise SettingsError(
            f"{path} holds no settings: expected `key: value` lines; `mergequest init` writes an example"
        )
    return value


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
    if settings["statistics"]["cache"]:
        settings["statistics"]["cache"] = resolve(settings["statistics"]["cache"], root)
    for task in settings["tasks"].values():
        for split, files in task.get("data", {}).items():
            task["data"][split] = (
                resolve(files, root) if isinstance(files, str) else [resolve(file, root) for file in files]
            )
    return validate(Campaign, settings, path)


def parent(path: str) -> str:
    """The directory of a local file or an address."""
    return storage.absolute(path).rpartition("/")[0]


def resolve(path: str, root: str) -> str:
    """`path` as it is if absolute or an address, else below `root`."""
    if not storage.is_local(path):
        return path
    place = storage.local_path(path).expanduser()
    return os.path.normpath(place if place.is_absolute() else storage.join(root, str(place)))


def require_writable(path: str) -> None:
    """Looks whether a local directory could be written, before the work that fills it.

    Raises:
        SettingsError: It cannot, or there is a file in its place.
    """
    if not storage.is_local(path):
        return
    place = storage.local_path(path)
    if place.exists() and not place.is_dir():
        raise SettingsError(f"{path} is a file; name a directory")
    parent = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SettingsError(f"there is no right to write in {parent}: choose another place with --out")


def dump(campaign: Campaign) -> str:
    """A campaign as a YAML file, every default spelled out."""
    return yaml.safe_dump(campaign.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def validate(model: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """`value` as a settings model.

    Raises:
        SettingsError: One line for every mistake, with the place in the file and the nearest known key.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [f"  - {_explain(model, entry)}" for entry in error.errors(include_url=False)]
        raise SettingsError(f"{where}: {len(lines)} mistake{'s' * (len(lines) > 1)}:\n" + "\n".join(lines)) from error


def _explain(model: type[BaseModel], entry: Any) -> str:
    """One mistake that pydantic found, in a user's words."""
    place = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, entry["loc"][:-1]))
        return f"{place}: unknown key. {did_you_mean(str(entry['loc'][-1]), known)}"
    if entry["type"] == "missing":
        return f"{place}: missing"
    message = str(entry["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(entry["input"], dict) else f" (found {entry['input']!r})"
    return f"{place}: {message}{shown}" if place else message


def _fields_at(annotation: Any, loc: tuple[Any, ...]) -> set[str]:
    """The keys that are known at a place of the file."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return set(annotation.model_fields)
        field = annotation.model_fields.get(str(loc[0]))
        return _fields_at(field.annotation, loc[1:]) if field else set()
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        return _fields_at(inner[-1], loc[1:])
    if get_origin(annotation) is Annotated:
        return _fields_at(inner[0], loc)
    if get_origin(annotation) in (Union, UnionType) and loc:  # a union that is told apart by a tag has it in the place
        inner = tuple(
            m for m in inner if "kind" in getattr(m, "model_fields", {}) and m.model_fields["kind"].default == loc[0]
        )
        loc = loc[1:]
    return set().union(*(_fields_at(argument, loc) for argument in inner))
