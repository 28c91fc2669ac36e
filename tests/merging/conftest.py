from dataclasses import dataclass
from typing import Any

import pytest

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.statistics import STATISTICS, LikelihoodSettings, OutputGramSettings, StatisticSettings, measure, save
from merging.tasks import TextClassificationSettings, make_task

MEMBERS = ("one", "two", "three")
SETTINGS = {
    "fisher": LikelihoodSettings(examples=24),
    "gram": StatisticSettings(examples=24),
    "output_gram": OutputGramSettings(examples=24),
}


@dataclass(frozen=True)
class TinyMaterial:
    """The tiny pool with every member's statistics of its own task, and the tasks."""

    material: Material
    tasks: list[Any]
    owners: dict[str, str]


@pytest.fixture(scope="session")
def tiny_material(tiny_pool, tiny_campaign, tmp_path_factory) -> TinyMaterial:
    place = tmp_path_factory.mktemp("statistics")
    members = {name: str(tiny_pool[name]) for name in MEMBERS}
    pool = Pool.open(str(tiny_pool["base"]), members)
    settings = {name: TextClassificationSettings(**tiny_campaign["tasks"][name]) for name in MEMBERS}
    tasks = [make_task(name, settings[name], members[name]) for name in MEMBERS]
    found: dict[str, dict[str, Any]] = {kind: {} for kind in SETTINGS}
    for task in tasks:
        for kind in SETTINGS:
            statistic = STATISTICS[kind](SETTINGS[kind])
            file = save(
                str(place / f"{task.name}.{kind}.safetensors"),
                statistic,
                measure(task, statistic, "train"),
                checkpoint=pool.members[task.name].checkpoint.fingerprint,
                data="d",
            )
            found[kind][task.name] = file
    return TinyMaterial(Material(pool, found), tasks, {name: name for name in MEMBERS})
