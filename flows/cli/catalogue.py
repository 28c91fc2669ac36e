"""`mergequest methods`: what there is to merge with."""

from rich.console import Console
from rich.table import Table

from merging.methods import METHODS
from merging.methods.method import Parameter


def print_methods(console: Console | None = None) -> None:
    """Prints every method with what it needs, its scaling factor's range and its parameters."""
    table = Table("method", "needs", "scaling factor", "parameters", show_lines=True)
    for name in METHODS:
        method = METHODS[name]
        parameters = "\n".join(f"{key}: {_spec(spec)}. {spec.help}" for key, spec in method.parameters.items())
        needs = method.needs({key: spec.default for key, spec in method.parameters.items()})
        table.add_row(name, ", ".join(needs) or "weights only", _spec(method.scaling), parameters or "–")
    (console or Console()).print(table)


def _spec(spec: Parameter) -> str:
    """Default and range."""
    if spec.choices is not None:
        return f"{spec.default} of {', '.join(map(str, spec.choices))}"
    if spec.low is None or spec.high is None:
        return f"{spec.default}"
    return f"{spec.default} in {spec.low:g} … {spec.high:g}{' (log)' if spec.log else ''}"
