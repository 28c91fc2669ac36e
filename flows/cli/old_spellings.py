"""Spellings of the version before this one, read for as long as this version lasts: `mergequest campaign run` and its kin."""

from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from flows.cli.commands import campaigns, directories

GROUP = "campaign"
"""What stood before the commands."""
COMMANDS: Mapping[str, Callable[..., None]] = {
    "run": campaigns.run,
    "resume": campaigns.resume,
    "status": directories.status,
    "check": campaigns.check,
}
"""All that stood below it."""


class Deprecated(TyperGroup):
    """Says the new spelling on standard error, then runs the command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that a line begins with."""
        name, command, rest = super().resolve_command(ctx, args)
        old, new = f"{ctx.command_path} {name}", f"{ctx.parent.command_path} {name}"
        typer.secho(f"deprecated: `{old}` is `{new}` now; the next version will not read it", fg="yellow", err=True)
        return name, command, rest


def add_old_spellings(app: typer.Typer) -> None:
    """Adds them to the program, hidden from its help and from the reference."""
    old = typer.Typer(
        cls=Deprecated, help="What `mergequest run` and its kin were called before.", no_args_is_help=True
    )
    for name, command in COMMANDS.items():
        old.command(name)(command)
    app.add_typer(old, name=GROUP, hidden=True)
