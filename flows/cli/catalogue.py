"""`mergequest methods`: what there is to merge with."""

from rich.console import Console
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


def needs(method: Method) -> str:
    """What a method needs besides weights, at its parameters' defaults."""
    kinds = method.needs({name: spec.default for name, spec in method.parameters.items()})
    whole = [f"{method.solution} (of the whole subset)"] if method.solution else []
    return ", ".join([*kinds, *whole]) or "weights only"


def default_and_range(spec: Parameter) -> str:
    """A parameter's default, and what it may be."""
    if spec.choices is not None:
        return f"{spec.default} (of {', '.join(map(str, spec.choices))})"
    if spec.low is None or spec.high is None:
        return f"{spec.default}"
    return f"{spec.default}, {spec.low:g} … {spec.high:g}{' (log)' if spec.log else ''}"
