"""A campaign's last, optional step: the members' outputs are distilled into the winner."""

from collections.abc import Mapping

from flows.campaign.open_campaign import OpenCampaign
from flows.directory.progress import Display
from merging.io import addresses, hashing, storage
from merging.mergers.material import subset_fingerprint
from merging.methods import METHODS
from merging.recipe import Recipe
from ray_tasks.connect import connect
from ray_tasks.jobs import gradients
from ray_tasks.jobs.parallel import each

Files = Mapping[str, tuple[str, ...]]


def distil(
    opened: OpenCampaign, statistics: Files, start: Recipe, cache: str, display: Display
) -> tuple[Recipe, Files]:
    """Distils into a recipe's merge, unless that was done.

    Args:
        opened: The campaign.
        statistics: Member → statistics files.
        start: The merge to start from.
        cache: Directory of computed statistics.
        display: Shows progress.

    Returns:
        The recipe of the result, and the statistics files with that of its weights.
    """
    settings = opened.campaign.distil
    assert settings is not None
    data = {name: task.data_fingerprint("train") for name, task in opened.sources.items() if task.size("train")}
    key = {"statistic": "distilled", "version": 2, "start": start.as_dict(), **settings.model_dump(mode="json")}
    checkpoint = subset_fingerprint(opened.pool, start.members)
    path = addresses.join(
        cache,
        f"pool.distilled.{hashing.fingerprint([checkpoint, opened.pool.configurations(), data, key])}.safetensors",
    )
    if not storage.exists(path):
        call = (opened.setup(statistics), start, settings, key, path, checkpoint, hashing.fingerprint(data))
        with connect(), display.bar("percent of the distillation", 100) as bar:
            list(
                each(
                    gradients.distil,
                    {"winner": call},
                    cpus=opened.campaign.resources.threads,
                    retries=opened.campaign.resources.retries,
                    progress=lambda share: bar.reach(int(100 * share)),
                )
            )
    subset = "+".join(start.members)
    made = METHODS["distilled"].complete(
        Recipe("distilled", dict.fromkeys(start.members, 1.0), {"start": start.identity})
    )
    return made, {**statistics, subset: (*statistics.get(subset, ()), path)}
