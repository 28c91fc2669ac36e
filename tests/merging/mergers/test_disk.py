import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.checkpoints.checkpoint import SINGLE, Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import MethodError, PoolError
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.methods.spherical.interpolation import Spherical
from merging.recipe import Recipe

NEEDS = {name: METHODS[name].needs(METHODS[name].defaults()).members for name in METHODS}
DATA_FREE = [name for name in METHODS if not NEEDS[name] and METHODS[name].solution is None]
MEMBERS = ("one", "two", "three")
TASK_ARITHMETIC = Recipe("task_arithmetic", {"one": 0.7, "three": -0.2})


def open_pool(paths):
    return Pool.open(str(paths["base"]), {name: str(paths[name]) for name in MEMBERS})


@pytest.fixture(scope="module")
def material(tiny_pool):
    return Material(open_pool(tiny_pool))


def in_memory(material, recipe, dtype=torch.float32):
    out = {name: torch.empty(info.shape, dtype=dtype) for name, info in material.pool.weights.items()}
    ResidentMerger(material, out).merge(recipe)
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", DATA_FREE)
def test_memory_and_disk_agree(material, tmp_path, method, threads):
    """With so little memory that every matrix is cut, or merged alone where its method cannot cut it.

    Bit for bit, but where a sum over the entries of a weight depends on how it is cut.
    """
    tolerance = 1e-6 if isinstance(METHODS[method], Spherical) else 0.0
    recipe = METHODS[method].default_recipe(MEMBERS[: METHODS[method].most_members])
    out = in_memory(material, recipe)
    merge_to_disk(material, recipe, str(tmp_path / "out"), max_bytes=10_000, threads=threads)
    written = load_file(tmp_path / "out" / SINGLE)
    assert set(written) == set(material.pool.base.tensors)
    for name, value in out.items():
        assert (value - written[name]).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("model_stock", {"over": "rows"}),
        ("lines+model_stock", {"over": "rows"}),
        ("dare", {"rescale": "l1"}),
        ("lines+dare", {"rescale": "l1", "drop@one": 0.7}),
        ("ties", {"density@one": 0.6}),
        ("breadcrumbs", {"density@one": 0.6, "gamma@two": 0.1}),
    ],
)
def test_memory_and_disk_agree_where_rows_or_members_differ(material, tmp_path, method, parameters):
    """What asks for rows, or for a weight's norm, is not cut."""
    usual = METHODS[method].default_recipe(MEMBERS)
    recipe = replace(usual, parameters={**usual.parameters, **parameters})
    out = in_memory(material, recipe)
    merge_to_disk(material, recipe, str(tmp_path / "out"), max_bytes=10_000, threads=2)
    written = load_file(tmp_path / "out" / SINGLE)
    for name, value in out.items():
        assert (value - written[name]).abs().max() <= 1e-6 * value.abs().max(), name


def test_members_that_take_no_part_have_none(material, tiny_pool, tmp_path):
    members = {name: str(tiny_pool[name]) for name in ("one", "three")}
    small = Material(Pool.open(str(tiny_pool["base"]), members))
    recipe = METHODS["ties"].default_recipe(["one", "three"])
    for number, pool in enumerate((material, small)):
        merge_to_disk(pool, recipe, str(tmp_path / str(number)), max_bytes=10_000)
    assert (tmp_path / "0" / SINGLE).read_bytes() == (tmp_path / "1" / SINGLE).read_bytes()


@pytest.mark.parametrize("where", ["{tmp}/out", "memory://buffers{tmp}"])
def test_buffers_are_the_bases(tiny_pool, tmp_path, where):
    """Integers and booleans are nothing to average, whatever a member holds in their place."""
    buffers = {
        "steps": torch.tensor([3, 5]),
        "embeddings.position_ids": torch.arange(4),
        "seen": torch.tensor([True, False]),
    }
    for name, path in tiny_pool.items():
        shutil.copytree(path, tmp_path / name)
        own = buffers if name == "base" else {key: torch.zeros_like(value) for key, value in buffers.items()}
        save_file(load_file(path / SINGLE) | own, tmp_path / name / SINGLE, metadata={"format": "pt"})
    material = Material(open_pool({name: tmp_path / name for name in tiny_pool}))
    path = where.format(tmp=tmp_path)
    merge_to_disk(material, METHODS["average"].default_recipe(MEMBERS), path, dtype=torch.bfloat16)
    written = Checkpoint.open(path)
    for name, value in buffers.items():
        assert name not in material.pool.weights
        assert written.tensors[name].dtype == value.dtype
        assert torch.equal(written.read(name), value)


def test_disk_takes_a_dtype(material, tmp_path):
    recipe = METHODS["average"].default_recipe(["one", "two"])
    merge_to_disk(material, recipe, str(tmp_path / "out"), dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / SINGLE)
    mean = (
        material.pool.member_weight("one", "pooler.dense.weight")
        + material.pool.member_weight("two", "pooler.dense.weight")
    ) / 2
    assert torch.equal(written["pooler.dense.weight"], mean.bfloat16())


def test_shards_and_addresses_hold_the_same(material, tmp_path):
    address = f"memory://merged{tmp_path}"
    counts = []
    merge_to_disk(material, TASK_ARITHMETIC, str(tmp_path / "out"), max_shard_bytes=10_000, max_bytes=10_000)
    merge_to_disk(
        material,
        TASK_ARITHMETIC,
        address,
        max_shard_bytes=30_000,
        extra={"recipe.yaml": "a: b\n"},
        progress=lambda done, total: counts.append((done, total)),
    )
    local, remote = Checkpoint.open(str(tmp_path / "out")), Checkpoint.open(address)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    out = in_memory(material, TASK_ARITHMETIC)
    for name, value in out.items():
        assert torch.equal(local.read(name), value)
        assert torch.equal(remote.read(name), value)
    entries = sum(value.numel() for value in out.values())
    assert counts[-1] == (entries, entries)


def test_groups_of_weights_have_their_own_factors(material, tmp_path):
    recipe = Recipe("task_arithmetic", {"one@layers:0": 0.5, "one@*": 1.0, "two": 0.25})
    merge_to_disk(material, recipe, str(tmp_path / "out"), max_bytes=10_000)
    written = load_file(tmp_path / "out" / SINGLE)
    first = in_memory(material, Recipe("task_arithmetic", {"one": 0.5, "two": 0.25}))
    rest = in_memory(material, Recipe("task_arithmetic", {"one": 1.0, "two": 0.25}))
    lower = [name for name in first if "layer.0." in name]
    assert lower
    assert all(torch.equal(written[name], first[name]) for name in lower)
    assert torch.equal(written["pooler.dense.weight"], rest["pooler.dense.weight"])


def test_what_is_not_merged_comes_from_the_base(tiny_pool, tmp_path):
    """Integers, and what no member has, keep their bytes, among merged weights of any dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (40, 30), "b.weight": (7,), "c.scale": ()}
    paths = {}
    for number, who in enumerate(("base", *MEMBERS)):
        values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        values = {name: value.to((torch.bfloat16, torch.float16)[number % 2]) for name, value in values.items()}
        values["positions"] = torch.arange(5) + (number > 0)
        if who == "base":
            values["own"] = torch.randn(3, dtype=torch.float64, generator=generator)
        paths[who] = tmp_path / who
        paths[who].mkdir()
        save_file(values, paths[who] / SINGLE)
        (paths[who] / "config.json").write_text('{"model_type": "none"}')
    material = Material(open_pool(paths))
    merge_to_disk(material, TASK_ARITHMETIC, str(tmp_path / "out"), max_bytes=10_000)
    written, base = load_file(tmp_path / "out" / SINGLE), load_file(paths["base"] / SINGLE)
    assert torch.equal(written["positions"], base["positions"])
    assert torch.equal(written["own"], base["own"])
    for name, value in in_memory(material, TASK_ARITHMETIC, torch.bfloat16).items():
        assert torch.equal(written[name], value), name


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


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "multi_slerp", "iso_c"])
def test_damaged_weights_are_named_and_nothing_stays(tiny_pool, tmp_path, method):
    values = load_file(tiny_pool["two"] / SINGLE)
    values["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(values, broken / SINGLE)
    (broken / "config.json").write_bytes((tiny_pool["two"] / "config.json").read_bytes())
    material = Material(open_pool({**tiny_pool, "two": broken}))
    with pytest.raises(PoolError, match=r"two: 'encoder.layer.1.output.dense.weight' holds NaN or Inf"):
        merge_to_disk(material, METHODS[method].default_recipe(MEMBERS), str(tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken"]


def test_a_dtype_too_small_is_named(material, tmp_path):
    recipe = Recipe("linear", {"one": 1e8, "two": 1.0})
    with pytest.raises(
        MethodError, match=r"merges to numbers beyond torch.float16, though base and members are finite"
    ):
        merge_to_disk(material, recipe, str(tmp_path / "out"), dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_what_was_there(material, tmp_path):
    merge_to_disk(material, TASK_ARITHMETIC, str(tmp_path / "out"))
    before = (tmp_path / "out" / SINGLE).read_bytes()

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_to_disk(
            material, replace(TASK_ARITHMETIC, scaling={"one": 1.0}), str(tmp_path / "out"), progress=interrupt
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / SINGLE).read_bytes() == before


KILLED = """
import os, sys
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.checkpoints.pool import Pool
from merging.recipe import Recipe

base, member, out, signal = sys.argv[1:]
material = Material(Pool.open(base, {"one": member}))
recipe = Recipe("task_arithmetic", {"one": 1.0})
merge_to_disk(material, recipe, out, max_bytes=10_000, progress=lambda done, total: os.kill(os.getpid(), int(signal)))
"""


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_looks_finished(tiny_pool, tmp_path):
    arguments = [str(tiny_pool["base"]), str(tiny_pool["one"]), str(tmp_path / "out"), str(int(signal.SIGKILL))]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("**/config.json"))
