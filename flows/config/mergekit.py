"""mergekit's YAML as a recipe: what each of its keys is here, or one error that names those that cannot be expressed.

mergekit evaluates a parameter tensor by tensor: the narrowest place that has it wins (a slice's source or a model, the slice,
the file), filters choose by a part of the tensor's name, lists are interpolated over a slice's layers, and what lies before and
after the layers has a list's first value. So is it done here, over the base's own names, and the factors that come of it are
written as groups of weights. Defaults that differ from ours are spelled out, so that results agree.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, TypeAlias

from merging.errors import SettingsError
from merging.methods.depth import NUMBER, depth
from merging.methods.mergekit_names import MERGEKIT_NAMES
from merging.recipe import BASE, GROUP, Value
from merging.registry import did_you_mean

Params: TypeAlias = Mapping[str, Any]
"""Parameters as a file has them: scalars, lists, filters."""
Resolved: TypeAlias = dict[str, Any]
"""Parameters of one weight."""

DTYPES = ("float32", "bfloat16", "float16")
KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template", "name",
)  # fmt: skip
SLICE_KEYS = ("sources", "base_model", "parameters", "residual_weight")
SOURCE_KEYS = ("model", "layer_range", "parameters")
REQUIRED = object()
OF_TASK_VECTORS = {"weight": REQUIRED, "density": 1.0}
SHARED_OF_TASK_VECTORS = {"lambda": 1.0, "int8_mask": False}


@dataclass(frozen=True)
class _Kind:
    """What is known of a method of mergekit's.

    Args:
        shared: Parameters of the whole merge, with their defaults.
        own: Parameters of each model, with their defaults.
        base: `apart` (required, and no member), `any` (apart if there is one), `member` (one of the models), `none`.
        sparse: How task vectors are thinned, if they are: `magnitude`, `random`, `outliers`, `ranks`.
        elects: Whether signs are elected.
    """

    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    base: str = "apart"
    sparse: str | None = None
    elects: bool = False


def _of_task_vectors(sparse: str | None, elects: bool, normalize: bool, rescale: bool, **own: float) -> _Kind:
    shared = {**SHARED_OF_TASK_VECTORS, "normalize": normalize, "rescale": rescale}
    return _Kind(shared, {**OF_TASK_VECTORS, **own}, "apart", sparse, elects)


KINDS: Mapping[str, _Kind] = {
    "linear": _Kind({"normalize": True}, {"weight": REQUIRED}, "none"),
    "slerp": _Kind({"t": REQUIRED}, base="member"),
    "nuslerp": _Kind({"nuslerp_row_wise": False, "nuslerp_flatten": True}, {"weight": REQUIRED}, "any"),
    "multislerp": _Kind({"normalize_weights": True, "eps": 1e-8}, {"weight": REQUIRED}, "any"),
    "karcher": _Kind({"max_iter": 10, "tol": 1e-5}, base="none"),
    "model_stock": _Kind({"filter_wise": False}),
    "sce": _Kind({"select_topk": 1.0, "int8_mask": False}),
    "nearswap": _Kind({"t": REQUIRED}),
    "arcee_fusion": _Kind(),
    "ram": _Kind({"epsilon": 1e-5}),
    "ramplus_tl": _Kind({"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "task_arithmetic": _of_task_vectors(None, False, normalize=False, rescale=False),
    "ties": _of_task_vectors("magnitude", True, normalize=True, rescale=False),
    "dare_ties": _of_task_vectors("random", True, normalize=False, rescale=True),
    "dare_linear": _of_task_vectors("random", False, normalize=False, rescale=True),
    "breadcrumbs": _of_task_vectors("outliers", False, normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _of_task_vectors("outliers", True, normalize=False, rescale=False, gamma=0.01),
    "della": _of_task_vectors("ranks", True, normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _of_task_vectors("ranks", False, normalize=False, rescale=True, epsilon=0.15),
}
"""mergekit's methods that can be expressed."""
PASSTHROUGH = "passthrough"
"""mergekit's method that copies layers, which becomes a slices file."""
PARAMETERS = {name for kind in KINDS.values() for name in (*kind.shared, *kind.own)} | {
    "scale",
    "select_topk",
    "r",
    "alpha",
}


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
class Translated:
    """A recipe file's content, and what a user should know of it.

    Args:
        recipe: The content.
        notes: What was left out, and where results differ.
    """

    recipe: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    model: Model
    parameters: Params
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class _Slice:
    sources: tuple[_Source, ...]
    parameters: Params
    where: str


@dataclass(frozen=True)
class _Merge:
    """What the merge of one weight, or of many, is here."""

    method: str
    factors: tuple[float, ...]
    parameters: tuple[tuple[str, Value], ...] = ()


def is_mergekit(value: Mapping[str, Any]) -> bool:
    """Whether a YAML file's content is mergekit's."""
    return "merge_method" in value and "method" not in value


def is_passthrough(value: Mapping[str, Any]) -> bool:
    """Whether it is a mergekit configuration that copies layers, which becomes a slices file."""
    return is_mergekit(value) and value["merge_method"] == PASSTHROUGH


def translate(
    value: Mapping[str, Any],
    where: str,
    names: Callable[[str], Sequence[str]],
    template: Callable[[str], str | None] = lambda path: None,
) -> Translated:
    """A mergekit configuration as a recipe file's content, or a slices file's.

    Args:
        value: The configuration.
        where: The file's name, for messages.
        names: Gives the names of a model's weights, by its path; asked for only where parameters differ between weights.
        template: Gives a model's chat template, by its path; asked for only by `chat_template: auto`.

    Raises:
        SettingsError: Something is wrong with it, or cannot be expressed: every key is in the message.
    """
    return _Translation(value, where, names, template).run()


class _Translation:
    """One configuration on its way."""

    def __init__(
        self,
        value: Mapping[str, Any],
        where: str,
        names: Callable[[str], Sequence[str]],
        template: Callable[[str], str | None],
    ) -> None:
        self._value = value
        self._where = where
        self._names = names
        self._template = template
        self._problems: list[str] = []
        self._notes: list[str] = []

    def run(self) -> Translated:
        """See `translate`."""
        value = self._value
        for key in value:
            if key not in KEYS:
                self._problem(str(key), f"unknown key. {did_you_mean(str(key), list(KEYS))}")
        if "name" in value:
            self._note("`name` names the merge for mergekit-multi, and is left out")
        if value.get("modules") is not None:
            self._problem(
                "modules", "parts of a model with merges of their own have no recipe here: merge whole models"
            )
        method = str(value["merge_method"])
        if method not in KINDS and method != PASSTHROUGH:
            self._problem("merge_method", f"unknown method '{method}'. {did_you_mean(method, [*KINDS, PASSTHROUGH])}")
        base = self._model(value["base_model"], "base_model") if value.get("base_model") is not None else None
        slices = self._slices(base)
        kind = _Kind({}, {"scale": 1.0}, "none") if method == PASSTHROUGH else KINDS.get(method)
        if kind is None or not slices or not all(part.sources for part in slices):
            raise self._error()
        base = base or self._base_of(slices)
        if method == PASSTHROUGH:
            return self._passthrough(kind, slices, base)
        inputs = self._inputs(kind, slices, base)
        for place, parameters in self._places(slices):
            self._check_parameters(method, kind, place, parameters)
        members = _member_names(inputs)
        origin = base or slices[0].sources[0].model
        if kind.base in ("none", "member") or base is None:
            origin = Model(origin.path)  # whose configuration the merge has; its weights have no part in it
        recipe: dict[str, Any] = {
            "base": str(origin),
            "members": {members[model]: str(model) for model in inputs},
        }
        if origin.adapter:
            self._problem(
                "base_model",
                "an adapter on a model cannot be the base: merge the two first (peft's merge_and_unload)",
            )
        self._tokens(recipe, members, origin)
        self._dtype(recipe)
        self._raise()
        weights = self._weights(kind, slices, inputs, origin)
        self._raise()
        merges = {}
        for name, (shared, own) in weights.items():
            merges[name] = self._merge(method, kind, shared, own, inputs, base, list(members.values()))
            self._raise()
        self._method(recipe, merges, inputs, members, slices)
        self._raise()
        return Translated(recipe, tuple(dict.fromkeys(self._notes)))

    # What the file says

    def _slices(self, base: Model | None) -> tuple[_Slice, ...]:
        """`models` as one slice of all layers, or `slices`."""
        whole, parts = self._value.get("models"), self._value.get("slices")
        if self._value.get("modules") is not None:
            return ()
        if bool(whole) == bool(parts):
            self._problem("models", "either `models` or `slices` is needed, and not both")
            return ()
        if parts is None:
            return (_Slice(self._sources(whole, "models", ("model", "parameters")), {}, ""),)
        if not isinstance(parts, list):
            self._problem("slices", "expected a list")
            return ()
        found = []
        for number, part in enumerate(parts):
            where = f"slices.{number}"
            if not self._is_mapping(part, where, SLICE_KEYS):
                continue
            if part.get("residual_weight") is not None:
                self._problem(f"{where}.residual_weight", "mergekit itself has no use for it: leave it out")
            own = part.get("base_model")
            if own is not None and base is not None and self._model(own, f"{where}.base_model") != base:
                self._problem(f"{where}.base_model", "a merge has one base: name the file's `base_model`")
            sources = self._sources(part.get("sources"), f"{where}.sources", SOURCE_KEYS)
            found.append(_Slice(sources, self._parameters(part, where), where))
        return tuple(found)

    def _base_of(self, slices: Sequence[_Slice]) -> Model | None:
        """The base that slices name, where the file names none."""
        named = [part.get("base_model") for part in self._value.get("slices") or ()]
        models = [self._model(one, "slices.base_model") for one in named if one is not None]
        if len(set(models)) > 1 or (models and len(models) < len(slices)):
            self._problem("slices.base_model", "a merge has one base: name the file's `base_model`")
        return models[0] if models else None

    def _sources(self, value: Any, where: str, keys: Sequence[str]) -> tuple[_Source, ...]:
        if not isinstance(value, list) or not value:
            self._problem(where, "expected a list of models")
            return ()
        found = []
        for number, entry in enumerate(value):
            place = f"{where}.{number}"
            if not self._is_mapping(entry, place, keys):
                continue
            if "model" not in entry:
                self._problem(f"{place}.model", "missing")
                continue
            start, stop = 0, None
            if "layer_range" in keys:
                span = entry.get("layer_range")
                if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
                    self._problem(f"{place}.layer_range", "expected two numbers of layers, [first, one past the last]")
                    continue
                start, stop = span
            model = self._model(entry["model"], f"{place}.model")
            found.append(_Source(model, self._parameters(entry, place), start, stop))
        twice = [str(model) for model, count in Counter(source.model for source in found).items() if count > 1]
        if twice:
            self._problem(where, f"'{twice[0]}' stands twice: give it the sum of its weights")
        return tuple(found)

    def _model(self, value: Any, where: str) -> Model:
        """A reference: a path, `path+adapter`, or a mapping of `model` and `lora`."""
        if isinstance(value, Mapping):
            if value.get("override_architecture") is not None:
                self._problem(
                    where, "`override_architecture` is not known here: names and shapes come from the checkpoint"
                )
            path, adapter = (self._path(value.get(key), f"{where}.{key}") for key in ("model", "lora"))
            if path is None:
                self._problem(f"{where}.model", "missing")
            return Model(path or "", adapter)
        if not isinstance(value, str) or not value:
            self._problem(where, "expected a model's directory")
            return Model("")
        path, _, adapter = value.partition("+")
        if "+" in adapter:
            self._problem(where, f"expected one adapter after + (found {value!r})")
        return Model(self._path(path, where) or "", self._path(adapter, where) if adapter else None)

    def _path(self, value: Any, where: str) -> str | None:
        revision = None
        if isinstance(value, Mapping):
            value, revision = value.get("path"), value.get("revision")
        if value is None:
            return None
        if not isinstance(value, str):
            self._problem(where, "expected a model's directory")
            return None
        hub = re.fullmatch(r"([^/@\s]+/[^/@\s]+)@(\S+)", value)
        if hub or revision:
            path, revision = (hub[1], hub[2]) if hub else (value, revision)
            self._problem(
                where,
                f"a revision ('{revision}') is of the Hub, and checkpoints are read from directories: "
                f"`hf download {path} --revision {revision} --local-dir DIR`, and name DIR",
            )
        return value

    def _parameters(self, entry: Mapping[str, Any], where: str) -> Params:
        found = entry.get("parameters")
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            self._problem(f"{where}.parameters".lstrip("."), "expected `name: value` entries")
            return {}
        return found

    def _inputs(self, kind: _Kind, slices: Sequence[_Slice], base: Model | None) -> tuple[Model, ...]:
        """The members, in the file's order."""
        models = [source.model for source in slices[0].sources]
        for part in slices[1:]:
            if sorted(map(str, (source.model for source in part.sources))) != sorted(map(str, models)):
                self._problem(part.where, STACKED)
        where = "models" if self._value.get("models") else "slices.0.sources"
        method = self._value["merge_method"]
        if base is not None and base not in models and kind.base in ("member", "none"):
            models.append(base)  # as mergekit has it
        if kind.base in ("apart", "member") and base is None:
            self._problem("base_model", f"missing: {method} needs one")
        if kind.base in ("apart", "any") and base is not None:
            models = [model for model in models if model != base]
        if not models:
            self._problem(where, "only the base is here: name a model to merge into it")
        if method in ("slerp", "nuslerp") and len(models) != 2:
            self._problem(where, f"{method} is between two models (found {len(models)})")
        if method in ("nearswap", "arcee_fusion") and len(models) > 1:
            self._problem(where, f"{method} is between the base and one model (found {len(models)})")
        return tuple(models)

    def _places(self, slices: Sequence[_Slice]) -> Iterable[tuple[str, Params]]:
        """All parameters in the file, and where they stand."""
        yield "parameters", self._parameters(self._value, "")
        for part in slices:
            yield f"{part.where}.parameters", part.parameters
            for number, source in enumerate(part.sources):
                above = f"{part.where}.sources" if part.where else "models"
                yield f"{above}.{number}.parameters", source.parameters

    def _check_parameters(self, method: str, kind: _Kind, place: str, parameters: Params) -> None:
        for name in parameters:
            known = {**kind.shared, **kind.own}
            if name == "int8_mask":
                self._note("`int8_mask` is not needed and left out: masks take no memory here")
            elif name in known:
                if name not in kind.own and (place.startswith("models") or ".sources." in place):
                    self._note(
                        f"{place}.{name}: {method} has one for all models; a model's own is left out, as mergekit does"
                    )
            elif name in PARAMETERS:
                self._note(f"{place}.{name}: {method} has no such parameter; left out, as mergekit does")
            else:
                self._problem(
                    f"{place}.{name}", f"{method} has no such parameter. {did_you_mean(str(name), sorted(known))}"
                )

    # Layers one after another

    def _passthrough(self, kind: _Kind, slices: Sequence[_Slice], base: Model | None) -> Translated:
        """A slices file's content."""
        for place, parameters in self._places(slices):
            self._check_parameters(PASSTHROUGH, kind, place, parameters)
        for part in slices:
            if len(part.sources) > 1:
                self._problem(
                    f"{part.where}.sources" if part.where else "models", "passthrough copies one model at a time"
                )
        origin = base or slices[0].sources[0].model
        if base is None or base.adapter:
            origin = Model(origin.path)
        models = list(dict.fromkeys(part.sources[0].model for part in slices if part.sources[0].model != origin))
        members = _member_names(models)
        recipe: dict[str, Any] = {"base": str(origin)}
        if members:
            recipe["members"] = {members[model]: str(model) for model in models}
        self._tokens(recipe, members, origin)
        self._dtype(recipe)
        self._raise()
        filters = list(dict.fromkeys(_filters(parameters for _, parameters in self._places(slices))))
        places = [p for _, p in self._places(slices) if p.get("scale") is not None]
        names: list[str] = []
        if places or len({part.sources[0].model for part in slices}) > 1:
            names = list(self._names(str(origin)))
        if names:
            self._note_idle(filters, names)
        found: list[dict[str, Any]] = []
        for part in slices:
            source = part.sources[0]
            who = BASE if source.model == origin else members[source.model]
            settings = self._scales(part)
            found += self._copied(who, source, settings, names, filters)
        for name in names:
            part = slices[0] if depth(name) < math.inf else slices[-1]
            if not NUMBER.search(name) and self._resolve("scale", 1.0, self._scales(part), name, 0.0) != 1:
                self._problem(
                    "scale", f"mergekit scales '{name}' too, which is in no layer and is copied here: use filters"
                )
                break
        recipe["slices"] = found
        ends = [BASE if part.sources[0].model == origin else members[part.sources[0].model] for part in slices]
        first, last = ends[0], ends[-1]
        if first == last and first != BASE:
            recipe["rest"] = first
        elif first != last:
            before = [name for name in names if not NUMBER.search(name) and depth(name) < math.inf]
            recipe["rest"] = {**{escape(name): first for name in before}, "*": last}
        self._raise()
        return Translated(recipe, tuple(dict.fromkeys(self._notes)))

    def _scales(self, part: _Slice) -> list[tuple[str, Params]]:
        """Where a slice's scale may be given, the narrowest place first."""
        above = f"{part.where}.sources" if part.where else "models"
        found = [(f"{above}.0.parameters", part.sources[0].parameters), (f"{part.where}.parameters", part.parameters)]
        found.append(("parameters", self._parameters(self._value, "")))
        return [(place, parameters) for place, parameters in found if parameters.get("scale") is not None]

    def _copied(
        self,
        who: str,
        source: _Source,
        settings: Sequence[tuple[str, Params]],
        names: Sequence[str],
        filters: Sequence[str],
    ) -> list[dict[str, Any]]:
        """A slice, in pieces where its scale changes from layer to layer."""
        span = f"{source.start}-" if source.stop is None else _span(source.start, source.stop - 1)
        if source.stop is not None and source.stop <= source.start:
            self._problem("layer_range", f"[{source.start}, {source.stop}] has no layer")
            return []
        if not settings:
            return [{"source": who, "layers": span}]
        stop = source.stop if source.stop is not None else max(_layers(names).values(), default=0)
        pieces: list[tuple[int, int, Any]] = []
        for layer in range(source.start, stop):
            own = [name for name in names if (number := NUMBER.search(name)) and int(number[1]) == layer]
            t = (layer - source.start) / (stop - source.start - 1) if stop - source.start > 1 else 1.0
            factors = {name: self._resolve("scale", 1.0, settings, name, t) for name in own}
            grouped: dict[str, float] | None = {"*": next(iter(factors.values()), 1.0)}
            if len(set(factors.values())) > 1:
                grouped = _by_pattern(factors, filters)
            if grouped is None or (len(grouped) > 1 and grouped.get("*", 1.0) != 1):
                grouped = {escape(name): factor for name, factor in factors.items()}
            scale = {pattern: factor for pattern, factor in grouped.items() if factor != 1}
            if pieces and pieces[-1][2] == scale:
                pieces[-1] = (pieces[-1][0], layer, scale)
            else:
                pieces.append((layer, layer, scale))
        whole = len(pieces) == 1 and source.stop is None
        return [
            {"source": who, "layers": span if whole else _span(first, last)}
            | ({"scale": scale["*"] if list(scale) == ["*"] else scale} if scale else {})
            for first, last, scale in pieces
        ]

    # What it means for each weight

    def _weights(
        self, kind: _Kind, slices: Sequence[_Slice], inputs: Sequence[Model], base: Model
    ) -> dict[str, tuple[Resolved, list[Resolved]]]:
        """Parameters of the whole merge and of every member, by weight; under an empty name if all weights have the same."""
        wide = self._parameters(self._value, "")

        def settings(part: _Slice, model: Model | None) -> list[tuple[str, Params]]:
            found: list[tuple[str, Params]] = []
            for number, source in enumerate(part.sources):
                if source.model == model:
                    where = f"{part.where}.sources" if part.where else "models"
                    found.append((f"{where}.{number}.parameters", source.parameters))
            return [*found, (f"{part.where}.parameters", part.parameters), ("parameters", wide)]

        def resolved(part: _Slice, name: str, t: float) -> tuple[Resolved, list[Resolved]]:
            shared = {
                key: self._resolve(key, default, settings(part, None), name, t) for key, default in kind.shared.items()
            }
            own = [
                {key: self._resolve(key, default, settings(part, model), name, t) for key, default in kind.own.items()}
                for model in inputs
            ]
            return shared, own

        used = {*kind.shared, *kind.own} - {"int8_mask"}
        plain = all(
            _is_constant(setting)
            for place, parameters in self._places(slices)
            for key, setting in parameters.items()
            if key in used
        )
        if plain and not self._value.get("slices"):
            return {"": resolved(slices[0], "", 0.0)}
        names = list(self._names(str(base)))
        layers = _layers(names)
        spans = self._spans(slices, max(layers.values(), default=0))
        self._raise()
        cache: dict[Any, tuple[Resolved, list[Resolved]]] = {}
        filters = list(_filters(parameters for _, parameters in self._places(slices)))
        self._note_idle(filters, names)
        found = {}
        for name in names:
            part, t = _position(name, layers, slices, spans)
            key = part.where, t, tuple(text in name for text in filters)
            if key not in cache:
                cache[key] = resolved(part, name, t)
            found[name] = cache[key]
        return found

    def _spans(self, slices: Sequence[_Slice], layers: int) -> list[tuple[int, int]]:
        """The layers of each slice; each must come from the place in every model that it goes to."""
        if not self._value.get("slices"):
            return [(0, layers)]
        spans, end = [], 0
        for part in slices:
            starts = {(source.start, source.stop) for source in part.sources}
            if len(starts) != 1 or part.sources[0].start != end:
                self._problem(f"{part.where}.sources", STACKED)
                return []
            stop = part.sources[0].stop or 0
            spans.append((end, stop))
            end = stop
        if end != layers:
            self._problem("slices", f"they end at layer {end} of {layers}: {STACKED}")
        return spans

    def _resolve(self, key: str, default: Any, settings: Sequence[tuple[str, Params]], name: str, t: float) -> Any:
        """A parameter of one weight: the narrowest place that has a value for it."""
        for place, parameters in settings:
            if key in parameters:
                try:
                    found = _evaluate(parameters[key], name, t, like=default)
                except ValueError as error:
                    self._problem(f"{place}.{key}", str(error))
                    return 0.0
                if found is not None:
                    return found
        if default is REQUIRED:
            of = f" of '{name}'" if name else ""
            self._problem(f"{settings[0][0]}.{key}", f"missing{of}, and {self._value['merge_method']} needs it")
            return 0.0
        return default

    # What that is here

    def _merge(
        self,
        method: str,
        kind: _Kind,
        shared: Resolved,
        own: list[Resolved],
        inputs: Sequence[Model],
        base: Model | None,
        members: Sequence[str],
    ) -> _Merge:
        """The merge of one weight."""
        if "density" in kind.own:
            return self._sum(method, kind, shared, own, members)
        weights = tuple(one.get("weight", 1.0) for one in own)
        if method == "linear":
            return _Merge("linear", weights, (("normalize", shared["normalize"]),))
        if method == "slerp":
            t = shared["t"]
            return _Merge("slerp", tuple(1 - t if model == base else t for model in inputs), (("space", "weights"),))
        if method == "nuslerp":
            over = "tensor" if shared["nuslerp_flatten"] else "columns" if shared["nuslerp_row_wise"] else "rows"
            return _Merge("nuslerp", weights, (("space", "task_vectors" if base else "weights"), ("over", over)))
        if method == "karcher":
            self._note("the Karcher mean is iterated to convergence: `max_iter` and `tol` are left out")
            return _Merge("karcher", weights)
        if method == "multislerp":
            if not shared["normalize_weights"] and abs(sum(weights) - 1) > 1e-6:
                self._problem(
                    "parameters.normalize_weights", "weights always sum to 1 here: scale them so, or leave it out"
                )
            self._note("multislerp is the Karcher mean, iterated to convergence, of which mergekit takes one step")
            return _Merge("multi_slerp" if base else "karcher", weights)
        if method == "sce":
            return _Merge("sce", weights, (("select", shared["select_topk"]),))
        if method in ("ram", "ramplus_tl"):
            return _Merge(MERGEKIT_NAMES.get(method, (method, {}))[0], weights, tuple(sorted(shared.items())))
        if method in ("nearswap", "arcee_fusion"):
            return _Merge(method, weights, tuple(shared.items()))
        wise: tuple[tuple[str, Value], ...] = (("over", "rows"),) if shared["filter_wise"] else ()
        return _Merge("model_stock", weights, wise)

    def _sum(self, method: str, kind: _Kind, shared: Resolved, own: list[Resolved], members: Sequence[str]) -> _Merge:
        """A sum of task vectors, thinned or not, of all entries or of those that agree."""
        weights = [one["weight"] for one in own]
        whole = kind.sparse is None or min(one["density"] for one in own) >= 1  # mergekit then thins nothing
        if shared["rescale"] and not whole and kind.sparse in ("magnitude", "outliers"):
            self._problem("parameters.rescale", f"{method} does not rescale to the L1 norm: raise the weights instead")
        if kind.elects and (whole or kind.sparse == "magnitude"):
            agree = "mean" if shared["normalize"] else "sum"
            density = self._own("density", [min(one["density"], 1.0) for one in own], members)
            end = (("lambda", shared["lambda"]), ("trim", "tensor"), ("disjoint", agree))
            return _Merge("ties", tuple(weights), (*density, *end))
        mean = kind.elects and shared["normalize"]
        scale = 1.0 if mean else shared["lambda"]
        if not kind.elects and shared["normalize"]:
            total = sum(weights)
            scale /= total if abs(total) >= 1e-8 else 1.0
        factors = tuple(weight * scale for weight in weights)
        if whole:
            return _Merge("task_arithmetic", factors)
        densities = [min(one["density"], 1.0) for one in own]
        found = []
        if kind.sparse == "random":
            found += self._own("drop", [1 - density for density in densities], members)
        else:
            found += self._own("density", densities, members)
        if kind.sparse == "outliers":  # mergekit keeps the density where both shares exceed 1
            gammas = [min(one["gamma"], 1 - density) for one, density in zip(own, densities, strict=True)]
            found += self._own("gamma", gammas, members)
        if kind.sparse == "ranks":
            epsilons = [one["epsilon"] if density < 1 else 0.0 for one, density in zip(own, densities, strict=True)]
            found += self._own("epsilon", epsilons, members)
        found.append(("entries", "elected_mean" if mean else "elected" if kind.elects else "all"))
        if kind.sparse != "outliers":
            found.append(("rescale", "l1" if shared["rescale"] else "none"))
            self._note(
                f"{method} drops entries at random: mergekit's random numbers, which follow its seed, are others"
            )
        if mean and shared["lambda"] != 1:
            found.append(("lambda", shared["lambda"]))
        return _Merge(
            {"random": "dare", "outliers": "breadcrumbs"}.get(str(kind.sparse), "della"), factors, tuple(found)
        )

    def _own(self, name: str, values: Sequence[float], members: Sequence[str]) -> list[tuple[str, Value]]:
        """A parameter, and its value for those members that have another than the first."""
        others = [(f"{name}{GROUP}{member}", value) for member, value in zip(members, values, strict=True)]
        return [(name, values[0]), *((key, value) for key, value in others if value != values[0])]

    def _method(
        self,
        recipe: dict[str, Any],
        merges: Mapping[str, _Merge],
        inputs: Sequence[Model],
        members: Mapping[Model, str],
        slices: Sequence[_Slice],
    ) -> None:
        """Method, factors and parameters, which all weights must share but for the factors."""
        first = next(iter(merges.values()))
        for name, merge in merges.items():
            if (merge.method, merge.parameters) != (first.method, first.parameters):
                differing = {key for key, _ in set(merge.parameters) ^ set(first.parameters)} or {"density"}
                self._problem(
                    f"parameters.{', '.join(sorted(differing))}",
                    f"{first.method} has one for all weights here, and '{name}' has another than '{next(iter(merges))}': only "
                    "weights, t and what scales them may change from layer to layer or by filter",
                )
                return
        recipe["method"] = first.method
        filters = list(dict.fromkeys(_filters(parameters for _, parameters in self._places(slices))))
        scaling = {}
        for place, model in enumerate(inputs):
            factors = {name: merge.factors[place] for name, merge in merges.items()}
            scaling[members[model]] = _grouped(factors, filters)
        recipe["scaling"] = scaling
        if first.parameters:
            recipe["parameters"] = dict(first.parameters)

    def _tokens(self, recipe: dict[str, Any], members: Mapping[Model, str], base: Model) -> None:
        """Tokenizer and chat template."""
        source, settings = self._value.get("tokenizer_source"), self._value.get("tokenizer")
        where = "tokenizer_source"
        if settings is not None:
            if source is not None:
                self._problem(where, "stands beside `tokenizer`: one of the two")
            where = "tokenizer.source"
            if not self._is_mapping(settings, "tokenizer", ("source", "tokens", "pad_to_multiple_of")):
                return
            source = settings.get("source", "union")
            if settings.get("tokens"):
                self._problem(
                    "tokenizer.tokens", "embeddings of single tokens cannot be chosen: rows are merged as all others"
                )
            if settings.get("pad_to_multiple_of"):
                self._problem(
                    "tokenizer.pad_to_multiple_of",
                    "the vocabulary is not padded: resize_token_embeddings does it after",
                )
        files: dict[str, str] = {}
        if source == "union":
            recipe["vocabulary"] = "union"
        elif source not in (None, "base"):
            model = self._model(source, where)
            if model != base and model not in members:
                self._problem(where, f"'{model}' is none of the models")
            elif model != base:
                files["tokenizer"] = members[model]
        chat = self._value.get("chat_template")
        if chat == "auto":
            models = [model for model in (base, *members) if not model.adapter]
            found = {model: text for model in dict.fromkeys(models) if (text := self._template(model.path))}
            if found:
                common = Counter(found.values()).most_common(1)[0][0]
                owner = next(model for model, text in found.items() if text == common)
                if owner != base:
                    files["chat_template"] = members[owner]
            else:
                self._note("`chat_template: auto`: no model has a chat template")
        elif chat is not None:
            self._problem(
                "chat_template",
                "a merge has the template of one of its models: name none, or `auto`, and put another's text into the "
                "merge's chat_template.jinja",
            )
        if files:
            recipe["files_from"] = files

    def _dtype(self, recipe: dict[str, Any]) -> None:
        """The output's dtype; sums are formed in float32 whatever it is."""
        for key in ("dtype", "out_dtype"):
            given = self._value.get(key)
            if given is None:
                continue
            word = str(given).removeprefix("torch.")
            if word not in DTYPES:
                self._problem(key, f"'{given}' is no dtype of a merge. {did_you_mean(word, list(DTYPES))}")
            recipe["dtype"] = word

    # Messages

    def _is_mapping(self, value: Any, where: str, keys: Sequence[str]) -> bool:
        if not isinstance(value, Mapping):
            self._problem(where, "expected `key: value` entries")
            return False
        for key in value:
            if key not in keys:
                self._problem(f"{where}.{key}", f"unknown key. {did_you_mean(str(key), list(keys))}")
        return True

    def _note_idle(self, filters: Iterable[str], names: Sequence[str]) -> None:
        for text in filters:
            if not any(text in name for name in names):
                self._note(
                    f"filter '{text}' fits none of the base's weights, whose names are like '{names[len(names) // 2]}'"
                )

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _problem(self, key: str, why: str) -> None:
        self._problems.append(f"{key}: {why}")

    def _raise(self) -> None:
        if self._problems:
            raise self._error()

    def _error(self) -> SettingsError:
        lines = "\n".join(f"  - {line}" for line in dict.fromkeys(self._problems))
        return SettingsError(f"{self._where} is mergekit's, and no recipe can be made of it:\n{lines}")


STACKED = "layers that are left out, repeated, moved or of other models than the rest have no recipe here"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


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


def _filters(places: Iterable[Params]) -> Iterable[str]:
    """All filters, in the file's order."""
    for parameters in places:
        for setting in parameters.values():
            for entry in setting if isinstance(setting, list) else [setting]:
                if isinstance(entry, Mapping) and entry.get("filter") not in (None, "*"):
                    yield str(entry["filter"])


def _layers(names: Iterable[str]) -> dict[str, int]:
    """Number of layers by what stands before a layer's number in a weight's name."""
    found: dict[str, int] = {}
    for name in names:
        if number := NUMBER.search(name):
            before = name[: number.start(1)]
            found[before] = max(found.get(before, 0), int(number[1]) + 1)
    return found


def _position(
    name: str, layers: Mapping[str, int], slices: Sequence[_Slice], spans: Sequence[tuple[int, int]]
) -> tuple[_Slice, float]:
    """The slice that a weight belongs to, and how deep in it."""
    number = NUMBER.search(name)
    if number is None:
        return (slices[-1] if depth(name) == math.inf else slices[0]), 0.0  # before and after the layers alike
    layer = int(number[1])
    if len(slices) == 1:
        spans = [(0, layers[name[: number.start(1)]])]
    for part, (start, stop) in zip(slices, spans, strict=True):
        if start <= layer < stop:
            return part, (layer - start) / (stop - start - 1) if stop - start > 1 else 1.0
    return slices[-1], 0.0


def _member_names(models: Sequence[Model]) -> dict[Model, str]:
    """A name for each model: the last part of its path, or its adapter's."""
    found: dict[Model, str] = {}
    for model in models:
        last = (model.adapter or model.path).rstrip("/").rpartition("/")[2]
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:90] or "member"
        stem = "base-model" if stem == BASE else stem
        name, count = stem, 1
        while name in found.values():
            count += 1
            name = f"{stem}-{count}"
        found[model] = name
    return found


def _grouped(factors: Mapping[str, float], filters: Sequence[str]) -> float | dict[str, float]:
    """A member's factors, by weight, as one factor or as groups of weights that have every weight once."""
    values = set(factors.values())
    if len(values) == 1:
        return values.pop()
    return _by_layer(factors) or _by_pattern(factors, filters) or _by_layer_and_pattern(factors, filters)


def _by_layer(factors: Mapping[str, float]) -> dict[str, float] | None:
    """Groups of layers, if weights of one layer have the same factor."""
    found: dict[float, set[float]] = {}
    for name, factor in factors.items():
        found.setdefault(depth(name), set()).add(factor)
    if any(len(own) > 1 for own in found.values()):
        return None
    layers = sorted(layer for layer in found if layer < math.inf)
    groups: dict[str, float] = {}
    for layer in layers:
        (factor,) = found[layer]
        groups[f"layers:{layer}"] = factor
    if math.inf in found:
        groups["*"] = found[math.inf].pop()
    return groups


def _by_pattern(factors: Mapping[str, float], filters: Sequence[str]) -> dict[str, float] | None:
    """One group a filter, and one for the rest, if that says all."""
    groups: dict[str, float] = {}
    rest = dict(factors)
    for text in filters:
        own = {name for name in factors if text in name}
        if not own:
            continue
        if not own <= rest.keys() or len({factors[name] for name in own}) > 1:
            return None
        groups[f"*{escape(text)}*"] = factors[min(own)]
        rest = {name: factor for name, factor in rest.items() if name not in own}
    if len(set(rest.values())) > 1:
        return None
    return groups | ({"*": next(iter(rest.values()))} if rest else {})


def _by_layer_and_pattern(factors: Mapping[str, float], filters: Sequence[str]) -> dict[str, float]:
    """One group a filter and layer where these are apart, single names for what is left, and the rest."""
    groups: dict[str, float] = {}
    rest = dict(factors)
    for text in filters:
        layers: dict[str, set[str]] = {}
        for name in rest:
            if text in name and (number := NUMBER.search(name)):
                layers.setdefault(number[1], set()).add(name)
        for layer, own in layers.items():
            pattern = f"*.{layer}.*{escape(text)}*"
            if own == {name for name in factors if fnmatchcase(name, pattern)} and len({factors[n] for n in own}) == 1:
                groups[pattern] = factors[min(own)]
                rest = {name: factor for name, factor in rest.items() if name not in own}
    if rest:
        usual = Counter(rest.values()).most_common(1)[0][0]
        groups |= {escape(name): factor for name, factor in rest.items() if factor != usual}
        groups["*"] = usual
    return groups
