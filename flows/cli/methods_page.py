"""The page of all merge methods, docs/methods.md: written from the methods' own declarations."""

from importlib.resources import files
from inspect import cleandoc

from jinja2 import Template

from flows.cli.catalogue import default_and_range, needs
from flows.report.table import markdown_line
from merging.methods import METHODS, Method
from merging.methods.method import Parameter


def methods_page() -> str:
    """All methods that come with the program, as a Markdown page."""
    methods = sorted((METHODS[name] for name in METHODS), key=lambda method: method.name)
    own = [method for method in methods if type(method).__module__.startswith("merging.")]
    overview = ["| method | what it does | needs |", "|---|---|---|"]
    overview += [markdown_line([f"[`{m.name}`](#{m.name})", m.summary, needs(m)]) for m in own]
    template = (files("flows") / "templates" / "methods.md.j2").read_text()
    sections = "\n".join(map(_section, own))
    page: str = Template(template, keep_trailing_newline=True).render(overview="\n".join(overview), sections=sections)
    return page


def _section(method: Method) -> str:
    rows = [("scaling factor", method.scaling), *((f"`{name}`", spec) for name, spec in method.parameters.items())]
    table = [markdown_line([_named(name, spec), default_and_range(spec), spec.help]) for name, spec in rows]
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
