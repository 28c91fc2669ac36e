"""Commands on campaigns' directories, from any machine that can reach them: how far they are, and what they are asked."""

import sys
import time
from typing import Annotated

import typer

from flows.cli.commands.options import Where

LOOK = 5.0
"""Seconds between two looks of `status --watch`."""


def status(
    directory: Where,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per look.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look every few seconds until the campaign ends.")] = False,
) -> None:
    """Says how far a campaign is and whether its driver is alive, from any machine that can read its directory."""
    from rich.console import Console

    from flows.cli.status import read_status

    while True:
        state = read_status(directory)
        if watch and not json and sys.stdout.isatty():
            Console().clear()
        typer.echo(state.as_json() if json else state.as_text())
        if not watch or not state.may_change:
            return
        time.sleep(LOOK)


def stop(
    directory: Where,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
) -> None:
    """Ends a running campaign once what is in flight is measured, from any machine that can write into its directory."""
    from flows.cli.steer import stop

    typer.echo(stop(directory, wait))


def enqueue(
    directory: Where,
    recipe: Annotated[str, typer.Argument(help="Recipe file over the campaign's pool.", metavar="RECIPE.yaml")],
) -> None:
    """Has a campaign measure a recipe before its sampler's next proposal."""
    from flows.cli.steer import enqueue

    typer.echo(enqueue(directory, recipe))


def dashboard(
    directory: Where,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines look.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.", min=0, max=65535)] = 8080,
) -> None:
    """Serves optuna-dashboard from a campaign's ledger, live while it runs (`pip install 'mergequest[dashboard]'`)."""
    from flows.cli.dashboard import make_dashboard

    with make_dashboard(directory, host, port) as server:
        typer.echo(f"http://{host}:{server.server_port}/dashboard  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def list_campaigns(
    prefix: Annotated[
        str, typer.Argument(help="A directory or address, or how names in one begin.", metavar="PREFIX")
    ] = "runs",
    json: Annotated[bool, typer.Option("--json", help="One JSON object per campaign.")] = False,
) -> None:
    """Lists the campaigns below a directory or address, with how far each is."""
    from flows.cli.ls import print_campaigns

    print_campaigns(prefix, json)
