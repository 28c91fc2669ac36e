"""mergekit's configuration as a recipe file's content, or a slices file's."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.config.mergekit.diagnostics import Diagnostics
from flows.config.mergekit.grammar import Configuration, Model, is_mapping, read, read_model
from flows.config.mergekit.groups import grouped
from flows.config.mergekit.merges import Merge, merge_of
from flows.config.mergekit.methods import METHODS, PARAMETERS, PASSTHROUGH
from flows.config.mergekit.passthrough import copied_models, slices_of
from flows.config.mergekit.weights import STACKED, by_weight
from merging.recipe import BASE
from merging.registry import did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Translated:
    """A recipe file's content, and what a user should know of it.

    Args:
        recipe: The content.
        notes: What was left out, and where results differ.
    """

    recipe: dict[str, Any]
    notes: tuple[str, ...]


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
    diagnostics = Diagnostics(where)
    configuration = read(value, diagnostics)
    origin = _origin(configuration)
    copies = configuration.method == PASSTHROUGH
    models = copied_models(configuration, origin, diagnostics) if copies else _merged_models(configuration, diagnostics)
    _check_parameters(configuration, diagnostics)
    members = _member_names(models)
    recipe: dict[str, Any] = {"base": str(origin)}
    if members:
        recipe["members"] = {name: str(model) for model, name in members.items()}
    if origin.adapter:
        diagnostics.problem(
            "base_model",
            "an adapter on a model cannot be the base: merge the two first (peft's merge_and_unload)",
        )
    recipe |= _small_files(value, members, origin, template, diagnostics)
    recipe |= _dtype(value, diagnostics)
    diagnostics.check()

    def weights() -> Sequence[str]:
        return names(str(origin))

    if copies:
        recipe |= slices_of(configuration, origin, members, weights, diagnostics)
    else:
        recipe |= _merged(configuration, members, weights, diagnostics)
    diagnostics.check()
    return Translated(recipe, diagnostics.notes)


def _merged_models(configuration: Configuration, diagnostics: Diagnostics) -> tuple[Model, ...]:
    """The models that are merged, in the file's order."""
    method, base = configuration.method, configuration.base
    role = METHODS[method].base
    first, *others = configuration.slices
    models = [source.model for source in first.sources]
    for part in others:
        if sorted(str(source.model) for source in part.sources) != sorted(map(str, models)):
            diagnostics.problem(part.where, STACKED)
    if base is not None and base not in models and role in ("member", "none"):
        models.append(base)  # as mergekit has it
    if role in ("apart", "member") and base is None:
        diagnostics.problem("base_model", f"missing: {method} needs one")
    if role in ("apart", "any") and base is not None:
        models = [model for model in models if model != base]
    if not models:
        diagnostics.problem(first.sources_place, "only the base is here: name a model to merge into it")
    if method in ("slerp", "nuslerp") and len(models) != 2:
        diagnostics.problem(first.sources_place, f"{method} is between two models (found {len(models)})")
    if method in ("nearswap", "arcee_fusion") and len(models) > 1:
        diagnostics.problem(first.sources_place, f"{method} is between the base and one model (found {len(models)})")
    return tuple(models)


def _check_parameters(configuration: Configuration, diagnostics: Diagnostics) -> None:
    """Looks for parameters that the method does not have; mergekit ignores other methods'."""
    method = configuration.method
    shared, own = METHODS[method].shared, METHODS[method].own
    for place, parameters in configuration.places():
        for name in parameters:
            if name == "int8_mask":
                diagnostics.note("`int8_mask` is not needed and left out: masks take no memory here")
            elif name in own:
                continue
            elif name in shared:
                if place.startswith("models") or ".sources." in place:
                    diagnostics.note(
                        f"{place}.{name}: {method} has one for all models; a model's own is left out, as mergekit does"
                    )
            elif name in PARAMETERS:
                diagnostics.note(f"{place}.{name}: {method} has no such parameter; left out, as mergekit does")
            else:
                hint = did_you_mean(str(name), sorted({*shared, *own}))
                diagnostics.problem(f"{place}.{name}", f"{method} has no such parameter. {hint}")


def _origin(configuration: Configuration) -> Model:
    """The model whose configuration, and other files, the merge has; a recipe's base."""
    role, base = METHODS[configuration.method].base, configuration.base
    origin = base or configuration.slices[0].sources[0].model
    return origin if base and role in ("apart", "any") else Model(origin.path)  # its weights have no part in it


def _member_names(models: Sequence[Model]) -> dict[Model, str]:
    """A name for each model: the last part of its path, or its adapter's."""
    names: dict[Model, str] = {}
    for model in models:
        last = (model.adapter or model.path).rstrip("/").rpartition("/")[2]
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:90] or "member"
        stem = "base-model" if stem == BASE else stem
        name, count = stem, 1
        while name in names.values():
            count += 1
            name = f"{stem}-{count}"
        names[model] = name
    return names


def _merged(
    configuration: Configuration,
    members: dict[Model, str],
    names: Callable[[], Sequence[str]],
    diagnostics: Diagnostics,
) -> dict[str, Any]:
    """A recipe's method, factors and parameters.

    Raises:
        SettingsError: A parameter is missing, or cannot be expressed.
    """
    weights = by_weight(configuration, list(members), names, diagnostics)
    diagnostics.check()
    merges: dict[str, Merge] = {}
    for name, (shared, own) in weights.items():
        merges[name] = merge_of(configuration.method, shared, own, members, configuration.base, diagnostics)
        diagnostics.check()
    first = next(iter(merges))
    method, parameters = merges[first].method, merges[first].parameters
    for name, merge in merges.items():
        if (merge.method, merge.parameters) != (method, parameters):
            differing = {key for key, _ in set(merge.parameters) ^ set(parameters)} or {"density"}
            diagnostics.problem(
                f"parameters.{', '.join(sorted(differing))}",
                f"{method} has one for all weights here, and '{name}' has another than '{first}': only "
                "weights, t and what scales them may change from layer to layer or by filter",
            )
            diagnostics.check()
    filters = configuration.filters()
    scaling = {
        member: grouped({name: merge.factors[number] for name, merge in merges.items()}, filters)
        for number, member in enumerate(members.values())
    }
    return {"method": method, "scaling": scaling} | ({"parameters": dict(parameters)} if parameters else {})


def _small_files(
    value: Mapping[str, Any],
    members: Mapping[Model, str],
    base: Model,
    template: Callable[[str], str | None],
    diagnostics: Diagnostics,
) -> dict[str, Any]:
    """The recipe's `vocabulary` and `files_from`: tokenizer and chat template."""
    recipe: dict[str, Any] = {}
    source, settings = value.get("tokenizer_source"), value.get("tokenizer")
    where = "tokenizer_source"
    if settings is not None:
        if source is not None:
            diagnostics.problem(where, "stands beside `tokenizer`: one of the two")
        where = "tokenizer.source"
        if not is_mapping(settings, "tokenizer", ("source", "tokens", "pad_to_multiple_of"), diagnostics):
            return recipe
        source = settings.get("source", "union")
        if settings.get("tokens"):
            diagnostics.problem(
                "tokenizer.tokens", "embeddings of single tokens cannot be chosen: rows are merged as all others"
            )
        if settings.get("pad_to_multiple_of"):
            diagnostics.problem(
                "tokenizer.pad_to_multiple_of",
                "the vocabulary is not padded: resize_token_embeddings does it after",
            )
    files: dict[str, str] = {}
    if source == "union":
        recipe["vocabulary"] = "union"
    elif source not in (None, "base"):
        model = read_model(source, where, diagnostics)
        if model != base and model not in members:
            diagnostics.problem(where, f"'{model}' is none of the models")
        elif model != base:
            files["tokenizer"] = members[model]
    chat = value.get("chat_template")
    if chat == "auto":
        models = [model for model in (base, *members) if not model.adapter]
        templates = {model: text for model in dict.fromkeys(models) if (text := template(model.path))}
        if templates:
            common = Counter(templates.values()).most_common(1)[0][0]
            owner = next(model for model, text in templates.items() if text == common)
            if owner != base:
                files["chat_template"] = members[owner]
        else:
            diagnostics.note("`chat_template: auto`: no model has a chat template")
    elif chat is not None:
        diagnostics.problem(
            "chat_template",
            "a merge has the template of one of its models: name none, or `auto`, and put another's text into the "
            "merge's chat_template.jinja",
        )
    if files:
        recipe["files_from"] = files
    return recipe


def _dtype(value: Mapping[str, Any], diagnostics: Diagnostics) -> dict[str, Any]:
    """The recipe's `dtype`, the output's; sums are formed in float32 whatever it is."""
    recipe = {}
    for key in ("dtype", "out_dtype"):
        given = value.get(key)
        if given is None:
            continue
        word = str(given).removeprefix("torch.")
        if word not in DTYPES:
            diagnostics.problem(key, f"'{given}' is no dtype of a merge. {did_you_mean(word, list(DTYPES))}")
        recipe["dtype"] = word
    return recipe
