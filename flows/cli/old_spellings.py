"""Spellings of the version before this one, read for as long as this version lasts: `mergequest campaign run` and its kin."""

from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

GROUP = "campaign"
"""What stood before the commands."""
NAMES = ("run", "resume", "status", "check")
"""All that stood below it."""


class Deprecated(TyperGroup):
    """Says the new spelling on standard error, then runs the command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that a line begins with."""
        name, command, rest = super().resolve_command(ctx, args)
        old, new = f"{ctx.command_path} {name}", f"{ctx.parent.command_path} {name}"
        typer.secho(f"deprecated: `{old}` is `{new}` now; the next version will not read it", fg="yellow", err=True)
        return name, command, rest


def add_old_spellings(app: typer.Typer, commands: Mapping[str, Callable[..., None]]) -> None:
    """Adds them to the program with its commands, hidden from its help and from the reference."""
    old = typer.Typer(
        cls=Deprecated, help="What `mergequest run` and its kin were called before.", no_args_is_help=True
    )
    for name in NAMES:
        old.command(name)(commands[name])
    app.add_typer(old, name=GROUP, hidden=True)
