"""Commands on what a campaign has measured: the report, and candidates as checkpoints."""

from typing import Annotated

import typer

from flows.cli.commands.options import Quiet, Where, make_display


def report(
    directory: Annotated[
        str, typer.Argument(help="A campaign's directory; with `--experiment`, results.", metavar="DIR")
    ],
    experiment: Annotated[
        bool,
        typer.Option(
            "--experiment",
            help="DIR is an experiment's result (Parquet) or a directory of them, as `python -m benchmarks.papers` writes: "
            "writes a page, figures as SVG, tables as CSV and LaTeX.",
        ),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Of `--experiment`: directory to fill; by default `report` beside the results."),
    ] = None,
) -> None:
    """Writes a campaign's report anew from its ledger, finished or not; or a page of experiments from their results."""
    if experiment:
        from flows.cli.experiments import write_experiments

        typer.echo(write_experiments(directory, out))
        return
    from flows.campaign.summary import write_report
    from merging.errors import SettingsError

    if out is not None:
        raise SettingsError("--out: a campaign's report lies in its directory; `--out` goes with `--experiment`")
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
