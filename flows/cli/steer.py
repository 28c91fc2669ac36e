"""`mergequest stop` and `mergequest enqueue`: what a running campaign is told by files in its directory."""

import time
from collections.abc import Mapping
from shlex import quote

from flows.cli.status import read_status
from flows.config.campaign_file import Campaign
from flows.config.recipe_file import RecipeFile, load_recipe
from flows.directory import steering
from flows.directory.campaign_directory import Directory, is_same_checkpoint, known_revisions
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import SettingsError
from search.ledger.ledger import Ledger

LOOK = 2.0
"""Seconds between two looks at whether a driver has ended."""


def stop(path: str, wait: bool) -> str:
    """Asks the driver of a campaign to end once what is in flight has been measured.

    Args:
        path: The campaign's directory.
        wait: Whether to return only when it has ended.

    Returns:
        What to tell the user.

    Raises:
        SettingsError: There is no campaign, or no driver at work on it.
    """
    status = read_status(path)
    if status.state not in ("running", "silent"):
        raise SettingsError(f"{path}: no driver is at work on it ({status.state}); there is nothing to stop")
    steering.request_stop(path)
    if not wait:
        return f"{status.name} ends once what is in flight is measured; `mergequest resume {path}` goes on"
    while status.may_change:
        time.sleep(LOOK)
        status = read_status(path)
    return status.as_text()


def enqueue(path: str, recipe: str) -> str:
    """Has a campaign measure a recipe before its sampler's next proposal.

    Args:
        path: The campaign's directory.
        recipe: A recipe file over the campaign's own base and members.

    Returns:
        What to tell the user.

    Raises:
        MergequestError: The recipe is wrong, or not one over the campaign's pool and methods.
    """
    directory = Directory(path)
    campaign, file = directory.campaign(), load_recipe(recipe)
    commits = known_revisions(path)
    require_same_merge(recipe, file, campaign, commits)
    for name, member in file.members.items():
        there = campaign.members[name].checkpoint if name in campaign.members else "none of this name"
        if not is_same_checkpoint(member.checkpoint, there, commits):
            raise SettingsError(f"{recipe}: '{name}' is {member.checkpoint}, and the campaign's is {there}")
    model_type = str(Checkpoint.open(commits.get(campaign.base, campaign.base)).config.get("model_type", ""))
    complete = steering.complete(file.recipe().as_dict(), model_type)
    steering.require_fit(complete, list(campaign.search.methods), list(campaign.members))
    if rows := [row for row in Ledger(directory.ledger, campaign.name).rows() if row.candidate == complete.identity]:
        again = "; once the cause is mended, `mergequest resume --retry-failed` measures it again"
        return f"{complete.identity} was measured before ({rows[0].status}{again * (rows[0].status == 'failed')})"
    steering.enqueue(path, complete)
    status = read_status(path)
    when = "before the next proposal" if status.state == "running" else "when the campaign goes on"
    more = ""
    if status.state == "finished" or status.done >= status.total:
        more = f", with a larger budget: `mergequest resume {quote(path)} --candidates N`"
    return f"{complete.identity} is measured {when}{more}"


def require_same_merge(name: str, file: RecipeFile, campaign: Campaign, revisions: Mapping[str, str]) -> None:
    """Looks whether a campaign makes of a recipe what `mergequest merge` makes of it.

    Args:
        name: The file.
        file: The recipe.
        campaign: The campaign.
        revisions: Checkpoint on the Hub → with the commit that the campaign began with.

    Raises:
        SettingsError: It does not.
    """
    if not is_same_checkpoint(file.base, campaign.base, revisions):
        raise SettingsError(f"{name} merges from {file.base}, the campaign's base is {campaign.base}")
    for setting in ("heads", "vocabulary"):
        own = getattr(file, setting)
        if own not in (getattr(campaign, setting), RecipeFile.model_fields[setting].default):
            raise SettingsError(
                f"{name} has {setting}: {own if isinstance(own, str) else list(own)}, and the campaign has not: merge it "
                "(`mergequest merge`), and have that scored (`mergequest evaluate`)"
            )
