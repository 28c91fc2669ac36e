"""mergekit's file as it is written: keys, references to models, slices, and where parameters stand."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flows.config.mergekit.diagnostics import Diagnostics
from flows.config.mergekit.methods import METHODS
from merging.io import hub
from merging.registry import did_you_mean

Params: TypeAlias = Mapping[str, Any]
"""Parameters as a file has them: scalars, lists, filters."""
KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template", "name",
)  # fmt: skip
SLICE_KEYS = ("sources", "base_model", "parameters", "residual_weight")
SOURCE_KEYS = ("model", "layer_range", "parameters")


@dataclass(frozen=True)
class Model:
    """A model as mergekit refers to it.

    Args:
        path: A directory, or a name on the Hub.
        adapter: That of a LoRA adapter on it, if any.
    """

    path: str
    adapter: str | None = None

    def __str__(self) -> str:
        return f"{self.path}+{self.adapter}" if self.adapter else self.path


@dataclass(frozen=True)
class Source:
    """A model's part in a slice.

    Args:
        model: The model.
        parameters: Its own parameters.
        place: Where these stand in the file.
        start: Its first layer.
        stop: One past its last; None for all there are.
    """

    model: Model
    parameters: Params
    place: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class SliceEntry:
    """Consecutive layers of the merge.

    Args:
        sources: The models that it is made of.
        parameters: Those of the slice.
        where: Its place in the file; empty where the file has `models`, which are one slice of all layers.
    """

    sources: tuple[Source, ...]
    parameters: Params
    where: str

    @property
    def sources_place(self) -> str:
        """Where its sources stand in the file."""
        return f"{self.where}.sources" if self.where else "models"

    @property
    def place(self) -> str:
        """Where its own parameters stand in the file."""
        return f"{self.where}.parameters"


@dataclass(frozen=True)
class Configuration:
    """A configuration that was read.

    Args:
        method: mergekit's name of the method.
        base: The base, if one is named.
        slices: The merge, from the first layer to the last.
        parameters: The file's own parameters, which count where no narrower place has them.
    """

    method: str
    base: Model | None
    slices: tuple[SliceEntry, ...]
    parameters: Params

    @property
    def is_whole(self) -> bool:
        """Whether models are merged whole: the file has `models`, not `slices`."""
        return not self.slices[0].where

    def places(self) -> Iterable[tuple[str, Params]]:
        """All parameters in the file, and where they stand."""
        yield "parameters", self.parameters
        for part in self.slices:
            yield part.place, part.parameters
            for source in part.sources:
                yield source.place, source.parameters

    def filters(self) -> list[str]:
        """All filters of parameters, in the file's order."""
        entries = (
            entry
            for _, parameters in self.places()
            for setting in parameters.values()
            for entry in (setting if isinstance(setting, list) else [setting])
        )
        named = (entry.get("filter") for entry in entries if isinstance(entry, Mapping))
        return list(dict.fromkeys(str(text) for text in named if text not in (None, "*")))

    def settings(self, part: SliceEntry, model: Model | None) -> list[tuple[str, Params]]:
        """Where a slice's parameters may stand, the narrowest place first; a model's own only if one is named."""
        own = [(source.place, source.parameters) for source in part.sources if source.model == model]
        return [*own, (part.place, part.parameters), ("parameters", self.parameters)]


def read(value: Mapping[str, Any], diagnostics: Diagnostics) -> Configuration:
    """A file's content as a configuration, whose parameters are not looked into.

    Raises:
        SettingsError: No merge can be made out: every problem so far is in the message.
    """
    for key in value:
        if key not in KEYS:
            diagnostics.problem(str(key), f"unknown key. {did_you_mean(str(key), list(KEYS))}")
    if "name" in value:
        diagnostics.note("`name` names the merge for mergekit-multi, and is left out")
    if value.get("modules") is not None:
        diagnostics.problem(
            "modules", "parts of a model with merges of their own have no recipe here: merge whole models"
        )
    method = str(value["merge_method"])
    if method not in METHODS:
        diagnostics.problem("merge_method", f"unknown method '{method}'. {did_you_mean(method, list(METHODS))}")
    given = value.get("base_model")
    base = None if given is None else read_model(given, "base_model", diagnostics)
    slices = _slices(value, base, diagnostics)
    if method not in METHODS or not slices or not all(part.sources for part in slices):
        raise diagnostics.error()
    base = base or _base_of(value, len(slices), diagnostics)
    return Configuration(method, base, slices, _parameters(value, "", diagnostics))


def _slices(value: Mapping[str, Any], base: Model | None, diagnostics: Diagnostics) -> tuple[SliceEntry, ...]:
    """`models` as one slice of all layers, or `slices`."""
    whole, parts = value.get("models"), value.get("slices")
    if value.get("modules") is not None:
        return ()
    if bool(whole) == bool(parts):
        diagnostics.problem("models", "either `models` or `slices` is needed, and not both")
        return ()
    if parts is None:
        return (SliceEntry(_sources(whole, "models", ("model", "parameters"), diagnostics), {}, ""),)
    if not isinstance(parts, list):
        diagnostics.problem("slices", "expected a list")
        return ()
    slices = []
    for where, part in _mappings(parts, "slices", SLICE_KEYS, diagnostics):
        if part.get("residual_weight") is not None:
            diagnostics.problem(f"{where}.residual_weight", "mergekit itself has no use for it: leave it out")
        own = part.get("base_model")
        if own is not None and base is not None and read_model(own, f"{where}.base_model", diagnostics) != base:
            diagnostics.problem(f"{where}.base_model", "a merge has one base: name the file's `base_model`")
        sources = _sources(part.get("sources"), f"{where}.sources", SOURCE_KEYS, diagnostics)
        slices.append(SliceEntry(sources, _parameters(part, where, diagnostics), where))
    return tuple(slices)


def _base_of(value: Mapping[str, Any], count: int, diagnostics: Diagnostics) -> Model | None:
    """The base that slices name, where the file names none."""
    named = [part.get("base_model") for part in value.get("slices") or () if isinstance(part, Mapping)]
    models = [read_model(one, "slices.base_model", diagnostics) for one in named if one is not None]
    if len(set(models)) > 1 or (models and len(models) < count):
        diagnostics.problem("slices.base_model", "a merge has one base: name the file's `base_model`")
    return models[0] if models else None


def _sources(value: Any, where: str, keys: Sequence[str], diagnostics: Diagnostics) -> tuple[Source, ...]:
    if not isinstance(value, list) or not value:
        diagnostics.problem(where, "expected a list of models")
        return ()
    sources = []
    for place, entry in _mappings(value, where, keys, diagnostics):
        if "model" not in entry:
            diagnostics.problem(f"{place}.model", "missing")
            continue
        start, stop = 0, None
        if "layer_range" in keys:
            span = entry.get("layer_range")
            if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
                diagnostics.problem(
                    f"{place}.layer_range", "expected two numbers of layers, [first, one past the last]"
                )
                continue
            start, stop = span
        model = read_model(entry["model"], f"{place}.model", diagnostics)
        parameters = _parameters(entry, place, diagnostics)
        sources.append(Source(model, parameters, f"{place}.parameters", start, stop))
    twice = [str(model) for model, count in Counter(source.model for source in sources).items() if count > 1]
    if twice:
        diagnostics.problem(where, f"'{twice[0]}' stands twice: give it the sum of its weights")
    return tuple(sources)


def _mappings(
    entries: Sequence[Any], where: str, keys: Sequence[str], diagnostics: Diagnostics
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a list that are mappings, and their places in the file; what `is_mapping` finds is a problem."""
    for number, entry in enumerate(entries):
        place = f"{where}.{number}"
        if is_mapping(entry, place, keys, diagnostics):
            yield place, entry


def read_model(value: Any, where: str, diagnostics: Diagnostics) -> Model:
    """A reference to a model: a path, `path+adapter`, or a mapping of `model` and `lora`."""
    if isinstance(value, Mapping):
        if value.get("override_architecture") is not None:
            diagnostics.problem(
                where, "`override_architecture` is not known here: names and shapes come from the checkpoint"
            )
        path, adapter = (_path(value.get(key), f"{where}.{key}", diagnostics) for key in ("model", "lora"))
        if path is None:
            diagnostics.problem(f"{where}.model", "missing")
        return Model(path or "", adapter)
    if not isinstance(value, str) or not value:
        diagnostics.problem(where, "expected a model's directory")
        return Model("")
    path, _, adapter = value.partition("+")
    if "+" in adapter:
        diagnostics.problem(where, f"expected one adapter after + (found {value!r})")
    return Model(_path(path, where, diagnostics) or "", _path(adapter, where, diagnostics) if adapter else None)


def _path(value: Any, where: str, diagnostics: Diagnostics) -> str | None:
    revision = None
    if isinstance(value, Mapping):
        value, revision = value.get("path"), value.get("revision")
    if value is None:
        return None
    if not isinstance(value, str):
        diagnostics.problem(where, "expected a model's directory")
        return None
    if revision is None:
        return value
    if not hub.is_id(on_hub := f"{value}@{revision}"):
        diagnostics.problem(where, f"a revision is of a model on the Hub, and '{value}' is no ORG/NAME of one")
    return on_hub


def _parameters(entry: Mapping[str, Any], where: str, diagnostics: Diagnostics) -> Params:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        diagnostics.problem(f"{where}.parameters".lstrip("."), "expected `name: value` entries")
        return {}
    return parameters


def is_mapping(value: Any, where: str, keys: Sequence[str], diagnostics: Diagnostics) -> bool:
    """Whether an entry is a mapping; that it is not, and keys that it may not have, are problems."""
    if not isinstance(value, Mapping):
        diagnostics.problem(where, "expected `key: value` entries")
        return False
    for key in value:
        if key not in keys:
            diagnostics.problem(f"{where}.{key}", f"unknown key. {did_you_mean(str(key), list(keys))}")
    return True
