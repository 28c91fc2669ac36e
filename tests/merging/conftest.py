import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.statistics import STATISTICS, LikelihoodSettings, OutputGramSettings, StatisticSettings, measure, save
from merging.tasks import TextClassificationSettings, make_task
from merging.testing import weights

TINY = ("one", "two", "three")
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
    members = {name: str(tiny_pool[name]) for name in TINY}
    pool = Pool.open(str(tiny_pool["base"]), members)
    settings = {name: TextClassificationSettings(**tiny_campaign["tasks"][name]) for name in TINY}
    tasks = [make_task(name, settings[name], members[name]) for name in TINY]
    result: dict[str, dict[str, Any]] = {kind: {} for kind in SETTINGS}
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
            result[kind][task.name] = file
    return TinyMaterial(Material(pool, result), tasks, {name: name for name in TINY})


@pytest.fixture(scope="session")
def reference():
    """The module of the methods' float64 references."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).parent / "methods" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_pool():
    return weights.make_weights


@pytest.fixture
def subset():
    """Some members of a pool's weights."""
    return weights.subset


@pytest.fixture
def merge():
    """Merges a pool through the public interface."""
    return weights.merge


@pytest.fixture
def complete():
    """A method's parameters, all spelled out."""
    return weights.complete


@pytest.fixture
def assert_close():
    """Asserts that two merges agree, relative to each tensor's largest entry."""
    return weights.assert_close
