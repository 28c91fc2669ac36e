"""mergekit's `passthrough` as a slices file: layers one after another, each with what it is multiplied by."""

import math
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from typing import Any

from flows.config.mergekit.diagnostics import Diagnostics
from flows.config.mergekit.grammar import Configuration, Model, Params, SliceEntry
from flows.config.mergekit.groups import by_pattern
from flows.config.mergekit.weights import Resolver, count_layers, note_idle_filters, position
from merging.methods.depth import NUMBER, depth
from merging.recipe import BASE


def copied_models(configuration: Configuration, origin: Model, diagnostics: Diagnostics) -> tuple[Model, ...]:
    """The models that layers are copied from, besides the base; a slice of several models is a problem."""
    for part in configuration.slices:
        if len(part.sources) > 1:
            diagnostics.problem(part.sources_place, "passthrough copies one model at a time")
    models = (part.sources[0].model for part in configuration.slices)
    return tuple(dict.fromkeys(model for model in models if model != origin))


def slices_of(
    configuration: Configuration,
    origin: Model,
    members: Mapping[Model, str],
    names: Callable[[], Sequence[str]],
    diagnostics: Diagnostics,
) -> dict[str, Any]:
    """The slices file's `slices`, and `rest` where that is not the base's.

    Args:
        configuration: A configuration whose slices are of one model each.
        origin: The slices file's base.
        members: The other models, and their names there.
        names: Gives the names of the base's weights; asked for only where weights are scaled, or of several models.
        diagnostics: Gets what cannot be expressed, and filters that fit nothing.
    """
    owners = [{origin: BASE, **members}[part.sources[0].model] for part in configuration.slices]
    slices, filters = configuration.slices, configuration.filters()
    resolver = Resolver(configuration, diagnostics)
    settings = [_scales(configuration, part) for part in slices]
    weights = list(names()) if any(settings) or len(set(owners)) > 1 else []
    if weights:
        note_idle_filters(filters, weights, diagnostics)
    entries: list[dict[str, Any]] = []
    for part, owner, scales in zip(slices, owners, settings, strict=True):
        entries += [{"source": owner, **piece} for piece in _pieces(part, scales, weights, filters, resolver)]
    for name in weights:
        scales = settings[0 if depth(name) < math.inf else -1]
        if not NUMBER.search(name) and resolver.value("scale", 1.0, scales, name, 0.0) != 1:
            diagnostics.problem(
                "scale", f"mergekit scales '{name}' too, which is in no layer and is copied here: use filters"
            )
            break
    first, last = owners[0], owners[-1]
    if first != last:
        before = [name for name in weights if not NUMBER.search(name) and depth(name) < math.inf]
        return {"slices": entries, "rest": {**{escape(name): first for name in before}, "*": last}}
    return {"slices": entries} | ({"rest": first} if first != BASE else {})


def _scales(configuration: Configuration, part: SliceEntry) -> list[tuple[str, Params]]:
    """Where a slice's scale is given, the narrowest place first."""
    settings = configuration.settings(part, part.sources[0].model)
    return [(place, parameters) for place, parameters in settings if parameters.get("scale") is not None]


def _pieces(
    part: SliceEntry,
    scales: Sequence[tuple[str, Params]],
    names: Sequence[str],
    filters: Sequence[str],
    resolver: Resolver,
) -> list[dict[str, Any]]:
    """A slice's layers, and their scale: one piece, or more where the scale changes from layer to layer."""
    source = part.sources[0]
    span = f"{source.start}-" if source.stop is None else _span(source.start, source.stop - 1)
    if source.stop is not None and source.stop <= source.start:
        resolver.diagnostics.problem("layer_range", f"[{source.start}, {source.stop}] has no layer")
        return []
    if not scales:
        return [{"layers": span}]
    stop = source.stop if source.stop is not None else max(count_layers(names).values(), default=0)
    pieces: list[tuple[int, int, dict[str, float]]] = []
    for layer in range(source.start, stop):
        t = position(layer, source.start, stop)
        own = [name for name in names if (number := NUMBER.search(name)) and int(number[1]) == layer]
        factors = {name: resolver.value("scale", 1.0, scales, name, t) for name in own}
        scale = _patterns(factors, filters)
        if pieces and pieces[-1][2] == scale:
            pieces[-1] = (pieces[-1][0], layer, scale)
        else:
            pieces.append((layer, layer, scale))
    whole = len(pieces) == 1 and source.stop is None
    return [
        {"layers": span if whole else _span(first, last)}
        | ({"scale": scale["*"] if list(scale) == ["*"] else scale} if scale else {})
        for first, last, scale in pieces
    ]


def _patterns(factors: Mapping[str, float], filters: Sequence[str]) -> dict[str, float]:
    """Pattern of names → factor, of one layer's weights; without those that stay as they are."""
    grouped: dict[str, float] | None = {"*": next(iter(factors.values()), 1.0)}
    if len(set(factors.values())) > 1:
        grouped = by_pattern(factors, filters)
    if grouped is None or (len(grouped) > 1 and grouped.get("*", 1.0) != 1):
        grouped = {escape(name): factor for name, factor in factors.items()}
    return {pattern: factor for pattern, factor in grouped.items() if factor != 1}


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
