"""Options that several commands have, and what they mean."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flows.config.campaign_file import Campaign
    from flows.directory.progress import Display

File = Annotated[
    str, typer.Argument(help="Campaign file (YAML); `mergequest init` writes one.", metavar="CAMPAIGN.yaml")
]
Where = Annotated[str, typer.Argument(help="A campaign's directory.", metavar="DIR")]
Out = Annotated[str | None, typer.Option("--out", help="Directory to fill, instead of the file's `directory`.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join (`auto`, or HOST:PORT); by default RAY_ADDRESS, else a local one for this run."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting in place of the file's, checked as if it stood there (`--set search.candidates=200`); may be given "
        "again.",
        metavar="KEY=VALUE",
    ),
]
Candidates = Annotated[int | None, typer.Option(help="Candidates to evaluate: `--set search.candidates=N`.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and results.")]


def join(address: str | None) -> None:
    """Names the Ray cluster to join, before anything imports Ray, which reads its address from the environment then."""
    if address:
        os.environ["RAY_ADDRESS"] = address


def make_display(quiet: bool) -> "Display":
    """A display on standard error."""
    from rich.console import Console

    from flows.directory.progress import Display

    return Display(Console(stderr=True, quiet=quiet))


def load(file: str, out: str | None, candidates: int | None, settings: list[str] | None) -> "Campaign":
    """The campaign of a file, with what the command line says instead.

    Raises:
        SettingsError: The file is missing, or something in it or on the command line is wrong.
    """
    from flows.config.campaign_file import load_campaign

    return with_settings(load_campaign(file, assignments(candidates, settings)), out)


def assignments(candidates: int | None, settings: list[str] | None) -> list[str]:
    """What the command line sets in place of the file's settings."""
    return [*(settings or []), *([] if candidates is None else [f"search.candidates={candidates}"])]


def with_settings(
    campaign: "Campaign", out: str | None, candidates: int | None = None, settings: list[str] | None = None
) -> "Campaign":
    """A campaign with what the command line says instead.

    Raises:
        SettingsError: Something there is wrong.
    """
    from flows.config.campaign_file import Campaign
    from flows.config.overrides import with_overrides
    from flows.config.yaml_file import validate
    from merging.io import addresses

    changed = with_overrides(campaign.model_dump(mode="json"), assignments(candidates, settings))
    if out is not None:
        changed["directory"] = addresses.absolute(out)
    return validate(Campaign, changed, "command line")
