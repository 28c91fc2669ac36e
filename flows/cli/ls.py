"""`mergequest ls`: the campaigns below a directory or address, a line each."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.cli.status import Status, read_status
from flows.config.campaign_file import CAMPAIGN_FILE
from flows.directory.heartbeat import FILE as PULSE
from merging.errors import MergequestError, SettingsError
from merging.io import addresses, storage
from merging.io.secrets import redacted

DEPTH = 3
"""Levels of directories that are looked through."""


def print_campaigns(prefix: str, as_json: bool = False) -> None:
    """Prints how far each campaign below a prefix is; one that cannot be read is a line with the reason.

    Args:
        prefix: A directory or address; or one up to which names in it begin (`runs/vision-`).
        as_json: One JSON object per campaign, instead of a table.

    Raises:
        SettingsError: There is no campaign.
    """
    places = sorted(campaigns_below(prefix))
    if not places:
        raise SettingsError(f"{prefix}: no campaign's directory there, nor {DEPTH} levels below it")
    table = Table("directory", "campaign", "state", "candidates", "best", "last row")
    for place in places:
        try:
            status = read_status(place)
        except MergequestError as error:
            why = redacted(str(error).splitlines()[0])
            if as_json:
                print(json.dumps({"directory": place, "error": why}))  # noqa: T201
            table.add_row(escape(place), "", "unreadable", "", escape(why), "")
            continue
        if as_json:
            print(json.dumps({"directory": place, **asdict(status)}))  # noqa: T201
        table.add_row(escape(place), status.name, status.state, f"{status.done}/{status.total}", *_best(status))
    if not as_json:
        Console().print(table)


def campaigns_below(prefix: str) -> Iterator[str]:
    """The directories of campaigns at a prefix, or below it; what lies in a campaign's own directory is not looked at."""
    if storage.is_dir(prefix):
        yield from _walk(prefix, DEPTH)
        return
    parent, _, start = prefix.rpartition("/")
    parent = parent or ("/" if prefix.startswith("/") else ".")
    for name in storage.list_dir(parent) if start else []:
        if name.startswith(start):
            yield from _walk(addresses.join(parent, name), DEPTH - 1)


def _walk(place: str, depth: int) -> Iterator[str]:
    names = storage.list_dir(place)
    if (CAMPAIGN_FILE in names and ("ledger" in names or "pool.json" in names)) or PULSE in names:
        yield place
    elif depth:
        for name in names:
            if not name.startswith(".") and storage.is_dir(below := addresses.join(place, name)):
                yield from _walk(below, depth - 1)


def _best(status: Status) -> tuple[str, str]:
    best = "" if status.best is None else f"{status.best:.4f} {status.best_method}"
    return best, status.last or ""
