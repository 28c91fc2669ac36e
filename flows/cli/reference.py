"""Pages of the reference that are written from the program itself; `make reference` writes them all to docs/.

python -m flows.cli.reference [DIRECTORY]
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from flows.cli.app import app
from flows.cli.methods_page import methods_page
from flows.cli.template import settings_reference
from flows.config.campaign_schema import SCHEMA_FILE, campaign_schema
from flows.report.table import markdown_line
from search.ledger.row import SCHEMA, VERSION, Row

API = {
    "Compute statistics": ["flows.campaign.run.compute_statistics"],
    "Merge in memory": [
        "merging.recipe.Recipe",
        "merging.checkpoints.pool.Pool",
        "merging.mergers.material.Material",
        "merging.mergers.resident.ResidentMerger",
        "merging.mergers.disk.merge_to_disk",
    ],
    "Read a ledger": [
        "search.objective.best",
        "search.objective.pareto",
        "search.ledger.distinct.distinct",
        "search.ledger.analysis.validation_beside_test",
        "search.ledger.analysis.importance",
        "search.ledger.analysis.marginal_effects",
        "search.ledger.analysis.evaluations_to_target",
        "search.ledger.analysis.compare",
        "search.ledger.analysis.as_study",
    ],
    "Select and sample": [
        "search.subsets.choose_subsets.select",
        "search.samplers.quality_diversity.QualityDiversitySampler",
    ],
    "Extend": [
        "merging.methods.Method",
        "merging.methods.Parameter",
        "merging.methods.Prepared",
        "merging.tasks.task.Task",
        "merging.statistics.Statistic",
    ],
}
"""What programs may call besides `mergequest` itself, by purpose; everything else may change without notice."""


def cli_page() -> str:
    """All commands and their options, as a Markdown page."""
    lines = [
        "# Command line",
        "",
        "Written from the commands' own declarations; `mergequest COMMAND --help` says the same. Input that cannot be used",
        "is one message and exit code 2; an interruption is exit code 130. `mergequest --traceback COMMAND …` shows where",
        "an error came from.",
    ]
    for name, command in _commands("mergequest", typer.main.get_command(app)):
        lines += ["", f"## `{name}`", "", inspect.cleandoc(command.help or "")]
        parameters = [parameter for parameter in command.params if parameter.name not in ("help", "traceback")]
        words = [_metavar(parameter) for parameter in parameters if isinstance(parameter, TyperArgument)]
        lines += ["", "```text", " ".join([name, *["[OPTIONS]"] * (len(words) < len(parameters)), *words]), "```"]
        if parameters:
            lines += ["", "| | default | meaning |", "|---|---|---|", *map(_parameter_row, parameters)]
    return "\n".join(lines) + "\n"


def columns_page() -> str:
    """The ledger's columns, as a Markdown page."""
    meanings = _arguments(inspect.getdoc(Row) or "")
    lines = [
        "# Ledger columns",
        "",
        f"Written from the ledger's own schema, version {VERSION} (`mergequest.ledger` in the files' metadata). How a ledger",
        "is read: [the ledger](ledger.md).",
        "",
        "| column | type | meaning |",
        "|---|---|---|",
    ]
    lines += [
        markdown_line([f"`{field.name}`", f"{_arrow(field.type)}{' or null' * field.nullable}", meanings[field.name]])
        for field in SCHEMA
    ]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """What programs may call, as a Markdown page."""
    lines = [
        "# Python API",
        "",
        "Written from the docstrings. These names keep their meaning between versions; everything else may change.",
    ]
    package = importlib.import_module("mergequest")
    every = {"mergequest": [f"mergequest.{name}" for name in package.__all__], **API}
    for heading, names in every.items():
        lines += ["", f"## {heading}"]
        if heading == "mergequest":
            lines += ["", _docstring(package)]
        for dotted in names:
            module, name = dotted.rsplit(".", 1)
            value = getattr(importlib.import_module(module), name)
            signature = _signature(name, value)
            lines += [
                "",
                f"### `{name}`",
                "",
                "```python",
                f"from {module} import {name}",
                "",
                signature,
                "```",
                "",
                _docstring(value),
                *_methods(value),
            ]
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    """The campaign file's schema, for editors."""
    return json.dumps(campaign_schema(), indent=1, ensure_ascii=False) + "\n"


PAGES = {
    "campaign.md": settings_reference,
    "methods.md": methods_page,
    "cli.md": cli_page,
    "columns.md": columns_page,
    "api.md": api_page,
    SCHEMA_FILE: schema_text,
}
"""File in docs/ → what writes it."""


def _commands(name: str, command: Any) -> list[tuple[str, TyperCommand]]:
    """All commands below one, with the words that call them."""
    if not isinstance(command, TyperGroup):
        return [(name, command)]
    below = command.commands.items()
    return [pair for word, inner in below if not inner.hidden for pair in _commands(f"{name} {word}", inner)]


def _metavar(parameter: Any) -> str:
    word = parameter.metavar or str(parameter.name).upper()
    return word if parameter.required else f"[{word}]"


def _parameter_row(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        name = parameter.metavar or str(parameter.name).upper()
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = (
        "required" if parameter.required else "" if parameter.default in (None, False, ()) else f"`{parameter.default}`"
    )
    return markdown_line([f"`{name}`", default, _line(parameter.help or "")])


def _signature(name: str, value: Any) -> str:
    """A call as it is written, one parameter a line where it is long; of an error, its name."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return name
    parameters = [_written(parameter) for parameter in inspect.signature(value).parameters.values()]
    line = f"{name}({', '.join(parameters)})"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + ",\n)"


def _written(parameter: inspect.Parameter) -> str:
    """A parameter with its type and default; defaults that are no literals are left out."""
    text = str(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_short(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    literal = isinstance(parameter.default, bool | int | float | str | tuple | None)
    return f"{text} = {parameter.default!r}" if literal else f"{text} = ..."


def _short(annotation: Any) -> str:
    """A type without the modules that its names come from."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation)).replace("'", "")


def _methods(value: Any) -> list[str]:
    """A class's public methods and properties, each with the first line that is said of it."""
    if not inspect.isclass(value):
        return []
    own = {name: member for name, member in vars(value).items() if not name.startswith("_") and inspect.getdoc(member)}
    own = {
        name: member for name, member in own.items() if isinstance(member, property | classmethod) or callable(member)
    }
    rows = [
        markdown_line([f"`{name}`", _line((inspect.getdoc(member) or "").split("\n\n")[0])])
        for name, member in own.items()
    ]
    return ["", "| | |", "|---|---|", *rows] if rows else []


def _docstring(value: Any) -> str:
    """A Google docstring as Markdown: its sections are lists."""
    head, *sections = re.split(r"^(Args|Returns|Raises|Yields):\n", inspect.getdoc(value) or "", flags=re.MULTILINE)
    parts = [head.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        text = inspect.cleandoc("\n" + body)
        entries = _entries(text) if title != "Returns" else []
        shown = "\n".join(f"- `{name}`: {meaning}" for name, meaning in entries) or " ".join(text.split())
        parts.append(f"**{title}**{'' if entries else ': ' + shown}" + ("\n\n" + shown if entries else ""))
    return "\n\n".join(part for part in parts if part)


def _arguments(docstring: str) -> dict[str, str]:
    """A Google docstring's arguments and what is said of them."""
    _, _, body = docstring.partition("Args:\n")
    return dict(_entries(inspect.cleandoc("\n" + body.split("\n\n")[0])))


def _entries(text: str) -> list[tuple[str, str]]:
    """The `name: meaning` entries of a section; what is indented goes on with the line before."""
    entries = re.findall(r"^(\*{0,2}\w[\w., ]*): (.*(?:\n .*)*)", text, re.MULTILINE)
    return [(name, _line(meaning)) for name, meaning in entries]


def _arrow(kind: pa.DataType) -> str:
    if pa.types.is_map(kind):
        return f"map {kind.key_type} → {kind.item_type}"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for file, write in PAGES.items():
        (directory / file).write_text(write())
