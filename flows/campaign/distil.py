"""A campaign's last, optional step: the members' outputs are distilled into the winner."""

from collections.abc import Iterable
from typing import Any

from flows.campaign.cluster import connected
from flows.campaign.needed_statistics import solution_path
from flows.campaign.open_campaign import Files, OpenCampaign
from flows.config.sections import DistilSettings
from flows.directory.progress import Display
from merging.evaluation.score_cache import statistic_fingerprint
from merging.io import hashing, storage
from merging.mergers.material import open_statistics, subset_fingerprint
from merging.methods import METHODS
from merging.recipe import BASE, Recipe
from merging.statistics import StatisticsFile
from ray_tasks.connect import device_each
from ray_tasks.jobs import distillation as jobs
from ray_tasks.jobs.distillation import DistillationJob
from search.ledger.row import Row


def distil(
    opened: OpenCampaign, statistics: Files, start: Recipe, settings: DistilSettings, cache: str, display: Display
) -> tuple[Recipe, Files, dict[str, float]]:
    """Distils into a recipe's merge, unless that was done; a run that was killed goes on where it was.

    Args:
        opened: The campaign.
        statistics: Member → statistics files.
        start: The merge to start from.
        settings: What to do.
        cache: Directory of computed statistics.
        display: Shows progress.

    Returns:
        The recipe of the result, whose members are those that it was merged from or that it learnt from; the statistics files
        with that of its weights; and what there is to note of its making in the ledger (`distil:steps` …).
    """
    job, members = job_of(opened, statistics, start, settings, cache)
    if not storage.exists(job.path):
        resources = opened.campaign.resources
        with connected(opened.campaign), display.bar("percent of the distillation", 100) as bar:
            jobs.distil(
                job,
                threads=resources.threads,
                gpus=device_each(resources.gpus),
                retries=resources.retries,
                nodes=opened.nodes,
                progress=lambda share: bar.reach(int(100 * share)),
            )
    subset = "+".join(members)
    made = METHODS["distilled"].complete(Recipe("distilled", dict.fromkeys(members, 1.0), {"start": start.identity}))
    file = StatisticsFile.open(job.path)
    notes = {f"distil:{name}": float(file.settings[name]) for name in ("steps", "best") if name in file.settings}
    notes["distil:examples"] = float(file.examples)
    return made, {**statistics, subset: (*statistics.get(subset, ()), job.path)}, notes


def job_of(
    opened: OpenCampaign, statistics: Files, start: Recipe, settings: DistilSettings, cache: str
) -> tuple[DistillationJob, list[str]]:
    """What is to be done, in a file whose name tells everything that it depends on; and the members of the result."""
    data = {name: task.data_fingerprint("train") for name, task in opened.sources.items() if task.size("train")}
    key = {"statistic": "distilled", "version": 3, "start": start.as_dict(), **settings.model_dump(mode="json")}
    taught = {name for name in data if opened.sources[name].has_logits}
    owners = {name: owner for name, (_, owner) in opened.campaign.sources().items() if name in taught}
    members = sorted({*start.members, *owners.values()})
    checkpoint = subset_fingerprint(opened.pool, members)
    others = [data, owners, _made_of(opened, statistics, start), key]
    path = solution_path(opened, "distilled", members, others, cache)
    setup = opened.setup(statistics)
    return DistillationJob(setup, start, settings, key, path, checkpoint, hashing.fingerprint(data)), members


def _made_of(opened: OpenCampaign, statistics: Files, start: Recipe) -> list[Any]:
    """What a merge depends on besides recipe and weights: statistics, numbers of examples, the vocabulary."""
    parties = {BASE, "+".join(start.members), *start.members}
    files = open_statistics(opened.pool, {who: paths for who, paths in statistics.items() if who in parties})
    read = {
        kind: {who: statistic_fingerprint(file, file.path in opened.published) for who, file in files[kind].items()}
        for kind in METHODS[start.method].kinds
        if kind in files
    }
    return [read, opened.examples(), opened.campaign.vocabulary]


def files_of(
    opened: OpenCampaign,
    statistics: Files,
    row: Row,
    rows: Iterable[Row],
    settings: DistilSettings,
    cache: str,
    display: Display,
) -> Files:
    """The statistics files that a candidate is merged from: of a distilled one with its own weights, made where they are gone.

    Args:
        opened: The campaign.
        statistics: Member → statistics files, without those of any distillation.
        row: The candidate.
        rows: The ledger, which has the merge that a distilled one started from.
        settings: How it was distilled.
        cache: Directory of computed statistics.
        display: Shows progress.
    """
    if row.method != "distilled":
        return statistics
    start = next(one.recipe for one in rows if one.candidate == row.parameters["start"])
    return distil(opened, statistics, start, settings, cache, display)[1]
