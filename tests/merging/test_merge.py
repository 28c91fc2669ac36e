import pytest
import torch
from safetensors.torch import load_file

from merging.disk import merge_to_disk, partition
from merging.errors import MethodError
from merging.merge import Material, ResidentMerger, base_recipe, member_recipe
from merging.methods import METHODS
from merging.pool import Pool
from merging.recipe import Recipe

NEEDS = {name: METHODS[name].needs({key: p.default for key, p in METHODS[name].parameters.items()}) for name in METHODS}
DATA_FREE = [name for name in METHODS if not NEEDS[name] and METHODS[name].solution is None]


@pytest.fixture(scope="module")
def material(tiny_pool):
    members = {name: str(path) for name, path in tiny_pool.items() if name != "base"}
    return Material(Pool.open(str(tiny_pool["base"]), members))


def empty_out(pool, dtype=torch.float32):
    return {name: torch.empty(info.shape, dtype=dtype) for name, info in pool.weights.items()}


@pytest.mark.parametrize("method", DATA_FREE)
def test_memory_and_disk_agree_bit_for_bit(material, tmp_path, method):
    recipe = METHODS[method].default_recipe(["one", "two", "three"][: METHODS[method].most_members])
    out = empty_out(material.pool)
    ResidentMerger(material, out).merge(recipe)
    merge_to_disk(material, recipe, str(tmp_path / "out"), max_bytes=20_000)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(partition(material.pool, 20_000)) > 3
    assert set(written) == set(material.pool.base.tensors)
    for name, value in out.items():
        assert torch.equal(value, written[name]), name


def test_disk_takes_a_dtype(material, tmp_path):
    recipe = METHODS["average"].default_recipe(["one", "two"])
    merge_to_disk(material, recipe, str(tmp_path / "out"), dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    mean = (
        material.pool.member_weight("one", "pooler.dense.weight")
        + material.pool.member_weight("two", "pooler.dense.weight")
    ) / 2
    assert torch.equal(written["pooler.dense.weight"], mean.bfloat16())


def test_references_are_copies(material):
    out = empty_out(material.pool)
    merger = ResidentMerger(material, out)
    merger.merge(base_recipe())
    assert all(torch.equal(value, material.pool.base_weight(name)) for name, value in out.items())
    merger.merge(member_recipe("two"))
    assert all(torch.equal(value, material.pool.member_weight("two", name)) for name, value in out.items())


def test_recipe_after_recipe_leaves_no_trace(material):
    out = empty_out(material.pool)
    merger = ResidentMerger(material, out)
    first = Recipe("task_arithmetic", {"one": 0.7, "three": -0.2})
    merger.merge(first)
    kept = {name: value.clone() for name, value in out.items()}
    merger.merge(METHODS["ties"].default_recipe(["one", "two", "three"]))
    merger.merge(first)
    assert all(torch.equal(value, kept[name]) for name, value in out.items())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("task_arithmetic", {"four": 1.0}), "'four' is no member of the pool"),
        (
            Recipe("taks_arithmetic", {"one": 1.0}),
            r"unknown method 'taks_arithmetic'. Did you mean 'task_arithmetic'\?",
        ),
        (Recipe("task_arithmetic", {"one": 1.0}, {"densty": 1}), "has no parameter 'densty'"),
        (Recipe("ties", {"one": 1.0}, {"density": 2.0}), "density = 2 is outside"),
        (Recipe("task_arithmetic", {}), "at least one member"),
        (Recipe("task_arithmetic", {"one": float("nan")}), "scaling factor of 'one'"),
        (Recipe("regmean", {"one": 1.0, "two": 1.0}), "needs the statistic 'gram' of one, two: compute it with"),
    ],
)
def test_wrong_recipes_write_nothing(material, tmp_path, recipe, message):
    with pytest.raises(MethodError, match=message):
        merge_to_disk(material, recipe, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
