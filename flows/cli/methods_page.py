"""The page of all merge methods, docs/methods.md: written from the methods' own declarations.

python -m flows.cli.methods_page > docs/methods.md
"""

import sys
from importlib.resources import files
from inspect import cleandoc

from jinja2 import Template

from merging.methods import METHODS, Method
from merging.methods.method import Parameter


def methods_page() -> str:
    """All methods that come with the program, as a Markdown page."""
    methods = sorted((METHODS[name] for name in METHODS), key=lambda method: method.name)
    own = [method for method in methods if type(method).__module__.startswith("merging.")]
    overview = ["| method | what it does | needs |", "|---|---|---|"]
    overview += [f"| [`{m.name}`](#{m.name}) | {_cell(m.summary)} | {_needs(m)} |" for m in own]
    template = (files("flows") / "templates" / "methods.md.j2").read_text()
    sections = "\n".join(map(_section, own))
    page: str = Template(template, keep_trailing_newline=True).render(overview="\n".join(overview), sections=sections)
    return page


def _section(method: Method) -> str:
    rows = [("scaling factor", method.scaling), *((f"`{name}`", spec) for name, spec in method.parameters.items())]
    table = [f"| {_named(name, spec)} | {_range(spec)} | {_cell(spec.help)} |" for name, spec in rows]
    head = [
        f"## `{method.name}`",
        "",
        cleandoc(method.__doc__ or ""),
        "",
        "| | default, range | meaning |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *table, ""])


def _named(name: str, spec: Parameter) -> str:
    return name if spec.search else f"*{name}*"


def _needs(method: Method) -> str:
    kinds = method.needs({name: spec.default for name, spec in method.parameters.items()})
    return (
        ", ".join([*kinds, *([f"{method.solution} (of the whole subset)"] if method.solution else [])])
        or "weights only"
    )


def _range(spec: Parameter) -> str:
    if spec.choices is not None:
        return f"{spec.default} (of {', '.join(map(str, spec.choices))})"
    if spec.low is None or spec.high is None:
        return f"{spec.default}"
    return f"{spec.default}, {spec.low:g} … {spec.high:g}{' (log)' if spec.log else ''}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(methods_page())
