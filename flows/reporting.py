"""`mergequest report`: a campaign's report from what lies in its directory, finished or not."""

from datetime import UTC, datetime

import optuna

import search.study
from flows.config import Campaign
from flows.directory import Directory
from flows.export import versions
from flows.report import Facts, render
from merging import storage
from search.ledger import Ledger
from search.selection import Selection


def write_report(path: str) -> str:
    """Writes a campaign's report anew.

    Returns:
        The report's path.

    Raises:
        SettingsError: There is no campaign at `path`.
    """
    directory = Directory(path)
    campaign = directory.campaign()
    ledger = Ledger(directory.ledger, campaign.name)
    chosen = directory / "selection.json"
    page = render(
        ledger.rows(),
        tasks=list(campaign.tasks),
        selection=Selection.from_dict(storage.read_json(chosen)) if storage.exists(chosen) else None,
        study=read_study(directory, campaign),
        facts=facts(directory, campaign),
    )
    storage.write_text(directory.report, page)
    return directory.report


def read_study(directory: Directory, campaign: Campaign) -> optuna.Study | None:
    """The campaign's study as it stands, to look at; None where there is none."""
    url = campaign.search.storage
    if url is None:
        return search.study.read_study(directory / "study", campaign.name)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.load_study(study_name=campaign.name, storage=url)
    except (KeyError, ValueError):
        return None


def facts(directory: Directory, campaign: Campaign) -> Facts:
    """What the ledger does not know of its campaign."""
    return Facts(
        name=campaign.name,
        objective=", ".join(campaign.search.objectives),
        base=campaign.base,
        members={name: member.checkpoint for name, member in campaign.members.items()},
        tasks={
            name: ", ".join(task.model_dump(include={"kind", "metric"}).values()).replace("_", " ")
            for name, task in campaign.tasks.items()
        },
        phases=directory.read_timings(),
        commands=[
            f"mergequest campaign run {directory / 'campaign.yaml'} --out NEW_DIRECTORY",
            f"mergequest merge {storage.join(directory.best, 'recipe.yaml')} --out NEW_DIRECTORY",
        ],
        versions=versions(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
