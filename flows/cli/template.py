"""A commented campaign file to start from, and the reference of all settings: both written from the model itself."""

import textwrap
from inspect import cleandoc
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.config.campaign_file import Campaign
from flows.config.campaign_schema import SCHEMA_FILE
from flows.config.search_settings import WITH_DATA
from flows.report.table import markdown_line

WIDTH = 110
ORIGIN = (
    "Written from the program's own model of the file; `mergequest init` writes an example with all of it, and beside it "
    "[the schema](campaign.schema.json) by which editors complete and check the file. Paths are relative to the file; unknown "
    "keys, and keys that stand twice, are errors. `--set search.candidates=200` on the command line stands in place of the "
    "file's setting. `mergequest check` opens and compares everything that the file names, and finds what a run would stop at."
)
LATER = (
    "A campaign's directory keeps the file as it was resolved. Budgets (`search.candidates`, `seconds`, `patience` and the "
    "like), `resources`, `evaluation`, `test` and the place itself may change from run to run, and the search goes on. With "
    "anything else changed it is another campaign, which needs another directory (`--out`) once something was measured; "
    "`selection` can be changed until the first merge was evaluated. Statistics are not computed again where "
    "`statistics.cache` names the directory that holds them. A campaign stops before it mixes scores: when a checkpoint, or "
    "the examples that it is judged by, are no longer those that its ledger was measured on."
)
EXAMPLES: dict[str, Any] = {
    "name": "my-campaign",
    "base": "checkpoints/base",
    "members": {
        "amazon": {"checkpoint": "checkpoints/amazon"},
        "nyt": {"checkpoint": "checkpoints/nyt", "statistics": ["statistics/nyt.gram.safetensors"]},
    },
    "tasks": {
        task: {
            "kind": "text_classification",
            "data": {split: f"data/{task}/{split}.parquet" for split in ("train", "validation", "test")},
            "text": "text",
            "label": "label",
            "metric": "accuracy",
        }
        for task in ("amazon", "nyt")
    },
    "methods": list(WITH_DATA),
}
"""What the file shows where a setting has no default, or one that would not explain itself."""


def campaign_template() -> str:
    """A campaign file with every setting, its default and what it is for."""
    head = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# A mergequest campaign. Run it with: mergequest run THIS_FILE",
        "# Paths are relative to this file. Lines that begin with `# name: null` show a setting that is not set.",
        "",
    ]
    return "\n".join([*head, *_section(Campaign, 0)]) + "\n"


def settings_reference() -> str:
    """The campaign file's settings as a Markdown page."""
    lines = [
        "# The campaign file",
        "",
        *textwrap.wrap(ORIGIN, 118),
        "",
        *textwrap.wrap(LATER, 118),
    ]
    sections: list[tuple[str, type[BaseModel]]] = [("", Campaign)]
    while sections:
        place, model = sections.pop(0)
        lines += ["", f"## `{place}`" if place else "## Top level", ""]
        if place and model.__doc__:
            lines += [cleandoc(model.__doc__), ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            below = f"{place}.{name}" if place else name
            inner = _model_of(field)
            entries = _entry_models(field)
            if (section := inner or _optional_model(field)) is not None:
                sections.append((below, section))
            kinds = [entry.model_fields["kind"].default if "kind" in entry.model_fields else "" for entry in entries]
            sections += [
                (f"{below}.<name>" + f" ({kind})" * bool(kind), entry)
                for kind, entry in zip(kinds, entries, strict=True)
            ]
            default = "required" if field.is_required() else "see below" if inner else f"`{_inline(_default(field))}`"
            lines.append(markdown_line([f"`{name}`", default, field.description or ""]))
    return "\n".join(lines) + "\n"


def _section(model: type[BaseModel], depth: int) -> list[str]:
    """The lines of a model's settings, `depth` levels in."""
    indent = "  " * depth
    lines: list[str] = []
    for name, field in model.model_fields.items():
        inner = _model_of(field)
        if depth == 0 and (inner or name in EXAMPLES) and lines:
            lines.append("")
        lines += [f"{indent}# {line}" for line in textwrap.wrap(field.description or "", WIDTH - 2 - len(indent))]
        if inner is not None:
            lines += [f"{indent}{name}:", *_section(inner, depth + 1)]
            continue
        value = EXAMPLES.get(name, _default(field))
        if value is None:
            lines.append(f"{indent}# {name}: null")
            continue
        text = yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=None if name == "methods" else False)
        lines += [indent + line for line in text.splitlines()]
    return lines


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a section of its own."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _optional_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a section that may be left out."""
    models = [kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if len(models) == 1 and type(None) in get_args(field.annotation) else None


def _entry_models(field: FieldInfo) -> list[type[BaseModel]]:
    """The models of a mapping's entries: one, or one for each kind."""
    if get_origin(field.annotation) is not dict:
        return []
    entry = get_args(field.annotation)[1]
    entry = get_args(entry)[0] if get_origin(entry) is Annotated else entry
    alternatives = get_args(entry) or (entry,)
    return [model for model in alternatives if isinstance(model, type) and issubclass(model, BaseModel)]


def _default(field: FieldInfo) -> Any:
    """A field's default, as YAML writes it."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for key, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
        return ", ".join(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()
