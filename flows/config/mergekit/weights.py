"""mergekit's parameters weight by weight: precedence, filters, and gradients over layers.

mergekit evaluates a parameter tensor by tensor: the narrowest place that has it wins (a slice's source or a model, the slice,
the file), filters choose by a part of the tensor's name, lists are interpolated over a slice's layers, and what lies before and
after the layers has a list's first value.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flows.config.mergekit.diagnostics import Diagnostics
from flows.config.mergekit.grammar import Configuration, Model, Params, SliceEntry
from flows.config.mergekit.methods import METHODS, REQUIRED, MergekitMethod
from merging.methods.depth import NUMBER, depth

Resolved: TypeAlias = dict[str, Any]
"""Parameters of one weight."""

STACKED = "layers that are left out, repeated, moved or of other models than the rest have no recipe here"


@dataclass(frozen=True)
class Resolver:
    """Looks parameters up for single weights.

    Args:
        configuration: Where they stand.
        diagnostics: Gets what is missing, or no value.
    """

    configuration: Configuration
    diagnostics: Diagnostics

    def parameters(
        self, defaults: Mapping[str, Any], part: SliceEntry, model: Model | None, name: str, t: float
    ) -> Resolved:
        """Parameters of one weight.

        Args:
            defaults: Those that there are, with their defaults.
            part: The slice that the weight belongs to.
            model: Whose they are; None for those of the whole merge.
            name: The weight's name.
            t: How deep in the slice it lies, 0 … 1.
        """
        settings = self.configuration.settings(part, model)
        return {key: self.value(key, default, settings, name, t) for key, default in defaults.items()}

    def value(self, key: str, default: Any, settings: Sequence[tuple[str, Params]], name: str, t: float) -> Any:
        """A parameter of one weight: the narrowest place that has a value for it.

        Args:
            key: The parameter.
            default: Its default, or `REQUIRED`.
            settings: Where it may stand, the narrowest place first.
            name: The weight's name.
            t: How deep in its slice it lies, 0 … 1.
        """
        for place, parameters in settings:
            if key in parameters:
                try:
                    value = _evaluate(parameters[key], name, t, like=default)
                except ValueError as error:
                    self.diagnostics.problem(f"{place}.{key}", str(error))
                    return 0.0
                if value is not None:
                    return value
        if default is REQUIRED:
            of = f" of '{name}'" if name else ""
            why = f"missing{of}, and {self.configuration.method} needs it"
            self.diagnostics.problem(f"{settings[0][0]}.{key}", why)
            return 0.0
        return default


def by_weight(
    configuration: Configuration,
    models: Sequence[Model],
    names: Callable[[], Sequence[str]],
    diagnostics: Diagnostics,
) -> dict[str, tuple[Resolved, list[Resolved]]]:
    """Weight → parameters of the whole merge, and of every model; under an empty name if all weights have the same.

    Args:
        configuration: Where they stand.
        models: Those that are merged.
        names: Gives the names of the base's weights; asked for only where parameters differ between weights.
        diagnostics: Gets what is missing or no value, and filters that fit nothing.

    Raises:
        SettingsError: The slices are not the base's layers, each once and in its place.
    """
    method, slices = METHODS[configuration.method], configuration.slices
    resolver = Resolver(configuration, diagnostics)

    def resolved(part: SliceEntry, name: str, t: float) -> tuple[Resolved, list[Resolved]]:
        shared = resolver.parameters(method.shared, part, None, name, t)
        return shared, [resolver.parameters(method.own, part, model, name, t) for model in models]

    if configuration.is_whole and _is_uniform(configuration, method):
        return {"": resolved(slices[0], "", 0.0)}
    weights = list(names())
    layers = count_layers(weights)
    spans = _spans(configuration, max(layers.values(), default=0), diagnostics)
    diagnostics.check()
    filters = configuration.filters()
    note_idle_filters(filters, weights, diagnostics)
    cache: dict[Any, tuple[Resolved, list[Resolved]]] = {}
    parameters = {}
    for name in weights:
        part, t = _position(name, layers, slices, spans)
        key = part.where, t, tuple(text in name for text in filters)
        if key not in cache:
            cache[key] = resolved(part, name, t)
        parameters[name] = cache[key]
    return parameters


def position(layer: int, start: int, stop: int) -> float:
    """How deep a layer lies in a slice from `start` to before `stop`: 0 … 1, and 1 in a slice of one layer."""
    return (layer - start) / (stop - start - 1) if stop - start > 1 else 1.0


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """Number of layers by what stands before a layer's number in a weight's name."""
    layers: dict[str, int] = {}
    for name in names:
        if number := NUMBER.search(name):
            before = name[: number.start(1)]
            layers[before] = max(layers.get(before, 0), int(number[1]) + 1)
    return layers


def note_idle_filters(filters: Iterable[str], names: Sequence[str], diagnostics: Diagnostics) -> None:
    """Notes filters that choose no weight."""
    for text in filters:
        if not any(text in name for name in names):
            diagnostics.note(
                f"filter '{text}' fits none of the base's weights, whose names are like '{names[len(names) // 2]}'"
            )


def _spans(configuration: Configuration, layers: int, diagnostics: Diagnostics) -> list[tuple[int, int]]:
    """The layers of each slice; each must come from the place in every model that it goes to."""
    if configuration.is_whole:
        return [(0, layers)]
    spans, end = [], 0
    for part in configuration.slices:
        starts = {(source.start, source.stop) for source in part.sources}
        if len(starts) != 1 or part.sources[0].start != end:
            diagnostics.problem(part.sources_place, STACKED)
            return []
        stop = part.sources[0].stop or 0
        spans.append((end, stop))
        end = stop
    if end != layers:
        diagnostics.problem("slices", f"they end at layer {end} of {layers}: {STACKED}")
    return spans


def _position(
    name: str, layers: Mapping[str, int], slices: Sequence[SliceEntry], spans: Sequence[tuple[int, int]]
) -> tuple[SliceEntry, float]:
    """The slice that a weight belongs to, and how deep in it."""
    number = NUMBER.search(name)
    if number is None:
        return (slices[-1] if depth(name) == math.inf else slices[0]), 0.0  # before and after the layers alike
    layer = int(number[1])
    if len(slices) == 1:
        spans = [(0, layers[name[: number.start(1)]])]  # a model may have two stacks of layers, of different depths
    for part, (start, stop) in zip(slices, spans, strict=True):
        if start <= layer < stop:
            return part, position(layer, start, stop)
    return slices[-1], 0.0


def _is_uniform(configuration: Configuration, method: MergekitMethod) -> bool:
    """Whether all that a method uses has one value for all weights."""
    used = {*method.shared, *method.own} - {"int8_mask"}
    return all(
        _is_constant(setting)
        for _, parameters in configuration.places()
        for key, setting in parameters.items()
        if key in used
    )


def _is_constant(setting: Any) -> bool:
    """Whether a setting has one value for all weights."""
    if isinstance(setting, Mapping):
        return setting.get("filter") in (None, "*") and _is_constant(setting.get("value"))
    if isinstance(setting, list):
        if setting and isinstance(setting[0], Mapping):
            return _is_constant(setting[0])
        return len(set(map(str, setting))) <= 1
    return True


def _evaluate(setting: Any, name: str, t: float, like: Any) -> Any:
    """A setting's value for one weight; None where no filter chooses it.

    Args:
        setting: A scalar, a list over the layers, filters with one of these.
        name: The weight's name.
        t: How deep it lies, 0 … 1.
        like: The parameter's default, which says what type it is of.

    Raises:
        ValueError: It is no such value.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _scalar(setting, like)
    if not setting:
        return None
    if any(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            if not isinstance(entry, Mapping) or "value" not in entry or set(entry) - {"value", "filter"}:
                raise ValueError(f"expected `filter:` and `value:` in every entry (found {entry!r})")
            only = entry.get("filter")
            if only in (None, "*") or str(only) in name:
                return _evaluate(entry["value"], name, t, like)
        return None
    values = [_scalar(entry, like) for entry in setting]
    place = t * (len(values) - 1)
    if isinstance(values[0], bool):
        return values[int(place)]
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


def _scalar(value: Any, like: Any) -> float | bool:
    """A number, or a truth value where the default is one.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(like, bool):
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ValueError(f"expected true or false (found {value!r})")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number, a list of numbers, or filters (found {value!r})")
    return number
