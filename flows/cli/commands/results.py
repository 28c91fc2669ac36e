"""Commands on what a campaign has measured: the report, and candidates as checkpoints."""

from typing import Annotated

import typer

from flows.cli.commands.options import Quiet, Where, make_display


def report(directory: Where) -> None:
    """Writes a campaign's report anew from its ledger, finished or not."""
    from flows.campaign.summary import write_report

    typer.echo(write_report(directory))


def portfolio(
    directory: Where,
    count: Annotated[int, typer.Option("-k", "--count", help="How many.", min=1)] = 5,
    tolerance: Annotated[float, typer.Option(help="How much of the objective diversity is worth.")] = 0.02,
    json: Annotated[bool, typer.Option("--json", help="A JSON array.")] = False,
    export: Annotated[
        bool, typer.Option("--export", help="Write each as a checkpoint, in exports/CANDIDATE of the directory.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Chooses good and different candidates of a campaign, the winner first."""
    from flows.cli.portfolio import as_json, as_text, read_portfolio

    rows, places = read_portfolio(directory, count, tolerance), {}
    if export:
        from flows.cli.winners import export_candidates

        places = export_candidates(directory, rows, make_display(quiet))
    typer.echo(as_json(rows, places) if json else "\n".join([as_text(rows), *places.values()]))


def export(
    directory: Where,
    candidate: Annotated[
        str | None,
        typer.Argument(
            help="Its identity, or how that begins; by default the best merge that nothing was distilled into.",
            metavar="[CANDIDATE]",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Writes a campaign's candidate as a checkpoint, in exports/CANDIDATE of the directory."""
    from flows.cli.winners import export_candidates, find_candidate

    row = find_candidate(directory, candidate)
    typer.echo(export_candidates(directory, [row], make_display(quiet))[row.candidate])
