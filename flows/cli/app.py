"""The command line. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

import os
import signal
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flows.cli.commands import campaigns, directories, merges, pools, results
from flows.cli.old_spellings import add_old_spellings

# Numpy solves small systems here. Its threads would each spin for a tenth of a second when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

IMPORT = "statistics import"
"""A command of two words, beside `statistics CAMPAIGN.yaml`."""
COMMANDS: Mapping[str, Callable[..., None]] = {
    "init": campaigns.init,
    "run": campaigns.run,
    "resume": campaigns.resume,
    "status": directories.status,
    "stop": directories.stop,
    "enqueue": directories.enqueue,
    "dashboard": directories.dashboard,
    "ls": directories.list_campaigns,
    "check": campaigns.check,
    "train": pools.train,
    "statistics": pools.statistics,
    IMPORT: pools.import_statistics,
    "select": campaigns.select,
    "merge": merges.merge,
    "convert": merges.convert,
    "evaluate": campaigns.evaluate,
    "report": results.report,
    "portfolio": results.portfolio,
    "export": results.export,
    "push": merges.push,
    "methods": merges.methods,
    "submit": campaigns.submit,
    "quickstart": pools.quickstart,
}
"""Name → command, in the order in which `--help` lists them."""


class Commands(TyperGroup):
    """Ends every command alike: bad input is one message and exit code 2, an interruption 130."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        from merging.errors import MergequestError
        from merging.io.secrets import redacted
        from search.steering import StoppedError

        try:
            return super().invoke(ctx)
        except StoppedError as stopped:
            typer.echo(str(stopped))
            raise typer.Exit from None
        except MergequestError as error:
            if os.environ.get("MERGEQUEST_TRACEBACK"):
                raise
            typer.secho(f"error: {redacted(str(error))}", fg="red", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.secho(
                "stopped: what is finished is kept, and the same command goes on from there",
                fg="yellow",
                err=True,
            )
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that a line begins with; of two words, `statistics import`."""
        if args[:2] == IMPORT.split():
            return IMPORT, self.get_command(ctx, IMPORT), args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    help="Search for the best merge of fine-tuned models.",
    epilog="Start with `mergequest init my.yaml`, then `mergequest run my.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(shown: bool) -> None:
    if shown:
        from merging.versions import code_version

        typer.echo(f"mergequest {code_version()}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if traceback:
        os.environ["MERGEQUEST_TRACEBACK"] = "1"


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
add_old_spellings(app, COMMANDS)


def main() -> None:
    """Entry point of `mergequest`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` ends it as Ctrl-C does
    app()
