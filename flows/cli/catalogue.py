"""`mergequest methods`: what there is to merge with."""

import json
from inspect import cleandoc
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merging.methods import METHODS, Method
from merging.methods.method import Parameter


def print_methods(console: Console | None = None) -> None:
    """Prints every method with what it needs, its scaling factor's range and its parameters."""
    table = Table("method", "needs", "scaling factor", "parameters", show_lines=True)
    for name in METHODS:
        method = METHODS[name]
        parameters = "\n".join(
            f"{key}: {default_and_range(spec)}. {spec.help}" for key, spec in method.parameters.items()
        )
        table.add_row(name, needs(method), default_and_range(method.scaling), parameters or "–")
    (console or Console()).print(table)


def print_method(name: str, console: Console | None = None) -> None:
    """Prints all that a method declares: what it does, what it needs, and its parameters.

    Raises:
        MethodError: There is none of this name.
    """
    method = METHODS[name]
    console = console or Console()
    console.print(f"[bold]{escape(name)}[/]: {escape(method.summary)}\n", highlight=False)
    console.print(escape(cleandoc(method.__doc__ or "")), highlight=False)
    console.print(f"\nneeds: {needs(method)}", highlight=False)
    table = Table("", "default, range", "meaning")
    for key, spec in {"scaling factor": method.scaling, **method.parameters}.items():
        table.add_row(key, default_and_range(spec), escape(spec.help))
    console.print(table)


def print_methods_json(name: str | None = None) -> None:
    """Prints what methods declare as JSON: an array of all, or the object of one.

    Raises:
        MethodError: There is none of this name.
    """
    described = as_object(METHODS[name]) if name is not None else [as_object(METHODS[key]) for key in METHODS]
    print(json.dumps(described, indent=2, ensure_ascii=False))  # noqa: T201


def as_object(method: Method) -> dict[str, Any]:
    """What a method declares, for programs."""
    return {
        "name": method.name,
        "summary": method.summary,
        "description": cleandoc(method.__doc__ or ""),
        "statistics": list(method.needs(method.defaults()).members),
        "solution": method.solution,
        "most_members": method.most_members,
        "scaling": _parameter(method.scaling),
        "parameters": {name: _parameter(spec) for name, spec in method.parameters.items()},
    }


def _parameter(spec: Parameter) -> dict[str, Any]:
    return {
        "default": spec.default,
        "low": spec.low,
        "high": spec.high,
        "log": spec.log,
        "choices": None if spec.choices is None else list(spec.choices),
        "searched": spec.search,
        "help": spec.help,
    }


def needs(method: Method) -> str:
    """What a method needs besides weights, at its parameters' defaults."""
    needed = method.needs(method.defaults())
    whole = [f"{needed.whole} (of the whole subset)"] if needed.whole else []
    return ", ".join([*needed.members, *whole]) or "weights only"


def default_and_range(spec: Parameter) -> str:
    """A parameter's default, and what it may be."""
    if spec.choices is not None:
        return f"{spec.default} (of {', '.join(map(str, spec.choices))})"
    if spec.low is None or spec.high is None:
        return f"{spec.default}"
    return f"{spec.default}, {spec.low:g} … {spec.high:g}{' (log)' if spec.log else ''}"
