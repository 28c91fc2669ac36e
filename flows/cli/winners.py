"""Any candidates of a campaign as checkpoints, like its winner: whoever holds its directory needs no search for them."""

from collections.abc import Sequence

from flows.campaign.distil import files_of
from flows.campaign.export import export
from flows.campaign.needed_statistics import cache_of, joined, member_statistics, usable_solutions
from flows.campaign.open_campaign import Files, open_campaign
from flows.campaign.stages import distillation
from flows.campaign.summary import tables_as_markdown
from flows.config.sections import DistilSettings
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.report.table import in_words
from merging.errors import SettingsError
from merging.io import addresses, storage
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import best


def export_candidates(path: str, rows: Sequence[Row], display: Display) -> dict[str, str]:
    """Writes candidates as checkpoints like that of the winner, into `exports/<candidate>` of the campaign's directory.

    Those that are there already are left as they are. Statistics come from the campaign; no cluster is started unless
    some of them are gone.

    Args:
        path: The campaign's directory.
        rows: The candidates.
        display: Shows progress.

    Returns:
        Candidate → directory.

    Raises:
        MergequestError: The pool is no longer what it was, or something cannot be read or written.
    """
    directory = Directory(addresses.absolute(path))
    campaign = directory.campaign().model_copy(update={"directory": directory.path})
    places = {row.candidate: directory.exported(row.candidate) for row in rows}
    missing = [row for row in rows if not storage.exists(addresses.join(places[row.candidate], "config.json"))]
    if not missing:
        return places
    with display.phase("Pool"):
        opened = open_campaign(campaign, display, directory.path)
        directory.check_pool(opened.fingerprints)
    with display.phase("Statistics"):
        cache = cache_of(campaign)
        files: Files = member_statistics(opened, opened.kinds, cache, display)
        opened, solved = usable_solutions(opened, cache, display)
        files = joined(files, solved)
    card = tables_as_markdown(directory, campaign)
    known = Ledger(directory.ledger, campaign.name).rows()
    settings = distillation(opened) or DistilSettings()
    for row in missing:
        with display.phase(f"Export: {row.candidate}, {in_words(row.method)}"):
            used = files_of(opened, files, row, known, settings, cache, display)
            export(opened, used, row.recipe, places[row.candidate], table=card, row=row)
    return places


def find_candidate(path: str, candidate: str | None) -> Row:
    """A campaign's candidate that was measured on all of validation.

    Args:
        path: The campaign's directory.
        candidate: Its identity, or how that begins; None for the best merge that nothing was distilled into.

    Raises:
        SettingsError: There is no campaign, or no such candidate, or there are several.
    """
    directory = Directory(addresses.absolute(path))
    rows = Ledger(directory.ledger, directory.campaign().name).rows()
    ranked = best(rows, len(rows))
    chosen = [
        row for row in ranked if (row.candidate.startswith(candidate) if candidate else row.method != "distilled")
    ]
    if not chosen:
        wanted = f"no candidate '{candidate}'" if candidate else "no merge"
        raise SettingsError(f"{path} has {wanted} that was measured on all of validation: see its ledger or report")
    if candidate and len({row.candidate for row in chosen}) > 1:
        raise SettingsError(f"{path}: '{candidate}' begins the names of {len(chosen)} candidates: give more of it")
    return chosen[0]
