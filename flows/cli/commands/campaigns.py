"""Commands on a campaign file, or on the campaign that one began: write it, check it, run it, go on with it."""

from typing import Annotated

import typer

from flows.cli.commands.options import (
    Address,
    Candidates,
    File,
    Out,
    Quiet,
    Set,
    Where,
    assignments,
    join,
    load,
    make_display,
    with_settings,
)


def init(
    file: Annotated[str, typer.Argument(help="File to write.", metavar="CAMPAIGN.yaml")] = "campaign.yaml",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Writes a commented campaign file to start from, with every setting and its default.

    Beside it lies the file's JSON schema, which editors complete and check it by.
    """
    from flows.cli.template import campaign_template
    from flows.config.campaign_schema import SCHEMA_FILE, campaign_schema
    from flows.config.yaml_file import parent
    from merging.errors import SettingsError
    from merging.io import addresses, atomic, storage

    if storage.exists(file) and not force:
        raise SettingsError(f"{file} is there already: --force replaces it")
    atomic.write_text(file, campaign_template())
    atomic.write_json(addresses.join(parent(file), SCHEMA_FILE), campaign_schema())
    typer.echo(f"Wrote {file}. Name your base, members and tasks in it, then: mergequest run {file}")


def run(
    file: File,
    out: Out = None,
    candidates: Candidates = None,
    settings: Set = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Runs a campaign: statistics, selection, search, test, export, report. Run again, it does only what is missing."""
    join(address)
    from flows.campaign.run import run

    typer.echo(run(load(file, out, candidates, settings), make_display(quiet)))


def resume(
    directory: Where,
    candidates: Annotated[int | None, typer.Option(help="A new budget: `--set search.candidates=N`.")] = None,
    settings: Set = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure candidates that failed again, when the cause is mended.")
    ] = False,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Goes on with a campaign that was stopped or killed; no finished candidate is lost or repeated.

    Budgets and resources may be set anew (`--set search.seconds=3600`): the search goes on with them.
    """
    join(address)
    from flows.campaign.run import run
    from flows.directory.campaign_directory import Directory

    campaign = with_settings(Directory(directory).campaign(), directory, candidates, settings)
    typer.echo(run(campaign, make_display(quiet), retry_failed=retry_failed))


def check(file: File, settings: Set = None) -> None:
    """Opens and compares everything that a campaign names, and computes nothing."""
    from flows.campaign.run import check

    check(load(file, None, None, settings), make_display(False))
    typer.echo("Nothing is wrong with it.")


def select(file: File, out: Out = None, settings: Set = None, address: Address = None, quiet: Quiet = False) -> None:
    """Selects subsets of members by quality and diversity, and prints them, with q and S."""
    join(address)
    from flows.campaign.run import run_selection

    selection = run_selection(load(file, out, None, settings), make_display(quiet))
    for line in selection.as_text():
        typer.echo(line)


def evaluate(
    file: File,
    what: Annotated[
        list[str],
        typer.Argument(help="Recipe files, merged checkpoints, members' names, or `base`.", metavar="WHAT…"),
    ],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    mismatch: Annotated[
        bool, typer.Option(help="Show the gradient mismatch at each recipe's factors, from unlabelled train examples.")
    ] = False,
    settings: Set = None,
    address: Address = None,
    quiet: Quiet = False,
) -> None:
    """Scores recipes, checkpoints or members on a campaign's tasks, as the campaign did where it has begun.

    Statistics and numbers of examples are a recipe's own, where it names some. What a campaign's evaluators would merge
    otherwise than `merge` (other heads, another vocabulary) is refused.
    """
    join(address)
    from flows.cli.evaluate import evaluate as score

    score(load(file, None, None, settings), what, split, make_display(quiet), mismatch)


def submit(
    file: File,
    address: Annotated[
        str, typer.Option(help="Dashboard of the cluster (http://HOST:8265).")
    ] = "http://127.0.0.1:8265",
    out: Out = None,
    candidates: Candidates = None,
    settings: Set = None,
    what: Annotated[str, typer.Option(help="campaign, statistics, or merge (FILE is a recipe then).")] = "campaign",
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends, and exit as it does.")] = True,
) -> None:
    """Runs a campaign, its statistics or a merge as a job of a Ray cluster; Ctrl-C while following stops the job.

    The program and the resolved file travel; checkpoints, data and the directory to fill stay where they are, and every
    node must see them there (a shared file system, or s3:// addresses).
    """
    from flows.cli.submit import submit as send

    raise typer.Exit(send(file, address, out, follow, assignments(candidates, settings), what))
