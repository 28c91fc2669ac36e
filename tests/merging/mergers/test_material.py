import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material, open_statistics, subset_fingerprint
from merging.mergers.resident import ResidentMerger, joined
from merging.mergers.spread import SpreadMerger
from merging.mergers.weight_groups import split
from merging.methods import METHODS
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors


@pytest.fixture(scope="module")
def material(tiny_pool):
    members = {name: str(path) for name, path in tiny_pool.items() if name != "base"}
    return Material(Pool.open(str(tiny_pool["base"]), members))


def empty_out(pool, dtype=torch.float32):
    return {name: torch.empty(info.shape, dtype=dtype) for name, info in pool.weights.items()}


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


GROUPS = {"depth": ("layers:0", "layers:1-"), "shared input cut": ("*query.weight", "*bias", "*")}


@pytest.fixture(scope="module")
def complete_material(material, tmp_path_factory):
    """The pool with every kind of statistic; query, key and value share their Grams."""
    root = tmp_path_factory.mktemp("statistics")
    generator = torch.Generator().manual_seed(0)
    result = {}

    def save(kind, who, tensors, shared=None):
        about = Partial({}, {"examples": 8, "tokens": 8}, shared=shared or {})
        path = str(root / f"{who}.{kind}.safetensors")
        result.setdefault(kind, {})[who] = save_tensors(path, kind, {}, tensors, about, checkpoint="", data="")

    def square(size):
        value = torch.randn(2 * size, size, generator=generator)
        return value.T @ value

    for who in ("base", *material.pool.members):
        names = {
            name: material.pool.members[who].names[name] if who != "base" else name for name in material.pool.weights
        }
        shapes = {names[name]: tuple(info.shape) for name, info in material.pool.weights.items()}
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name}
        shared = {name: re.sub("key|value", "query", name) for name in matrices if re.search("key|value", name)}
        save("fisher", who, {name: torch.rand(shape, generator=generator) * 1e-3 for name, shape in shapes.items()})
        grams = {name: square(shape[1]) for name, shape in matrices.items() if name not in shared}
        save("gram", who, grams, shared)
        save("output_gram", who, {name: square(shape[0]) * 1e-4 for name, shape in matrices.items()})
    solved = {name: torch.randn(tuple(info.shape), generator=generator) for name, info in material.pool.weights.items()}
    for subset in ("one+three+two", "one+two"):
        for kind in ("propagated", "distilled"):
            save(kind, subset, solved)
    return replace(material, statistics=result)


def grouped(recipe, groups, step=0.0):
    """Every member's factor in every group; the n-th group's is higher by n steps."""
    scaling = {
        f"{member}@{group}": factor + number * step
        for member, factor in recipe.scaling.items()
        for number, group in enumerate(groups)
    }
    return replace(recipe, scaling=scaling)


@pytest.mark.parametrize(
    ("method", "parameters", "groups"),
    [
        *((name, {"iterations": 3} if name == "mats" else {}, "depth") for name in METHODS),
        ("regmean", {"factors": "gram"}, "shared input cut"),
        ("mats", {"iterations": 3}, "shared input cut"),
    ],
)
def test_groups_merge_as_plain_recipes_do(complete_material, tmp_path, method, parameters, groups):
    groups = GROUPS[groups]
    fixed = METHODS[method].scaling.maximum == METHODS[method].scaling.minimum == 1.0
    factors = {"one": 1.0, "two": 1.0, "three": 1.0} if fixed else {"one": 0.7, "two": 0.5, "three": 0.9}
    factors = dict(list(factors.items())[: METHODS[method].most_members])
    plain = Recipe(method, factors, parameters)
    out, expected = empty_out(complete_material.pool), empty_out(complete_material.pool)
    merger, reference = ResidentMerger(complete_material, out), ResidentMerger(complete_material, expected)

    reference.merge(plain)
    for recipe in (grouped(plain, groups), plain):  # in parts, and whole on the same parts
        report = merger.merge(recipe)
        for name, value in out.items():
            assert torch.equal(value, expected[name]), name
    assert report == reference.merge(plain)

    step = 0.0 if fixed else 0.05
    stepped = grouped(plain, groups, step)
    merger.merge(stepped)
    merge_to_disk(complete_material, stepped, str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    for number, names in enumerate(names for names, _ in split(sorted(out, key=place(groups)), stepped)):
        reference.merge(replace(plain, scaling={member: value + number * step for member, value in factors.items()}))
        for name in names:
            assert torch.equal(out[name], expected[name]), name
            torch.testing.assert_close(written[name], out[name], rtol=1e-5, atol=1e-7)


def place(groups):
    """The number of a name's group."""
    if groups == GROUPS["depth"]:
        return lambda name: 0 if "layer.0" in name or "embed" in name else 1
    return lambda name: 0 if name.endswith("query.weight") else 1 if name.endswith("bias") else 2


def test_groups_prepare_once(complete_material, monkeypatch):
    prepared = []
    method = METHODS["regmean"]
    before = type(method).prepare
    monkeypatch.setattr(
        type(method),
        "prepare",
        lambda self, weights, context: prepared.append(len(weights)) or before(self, weights, context),
    )
    out = empty_out(complete_material.pool)
    merger = ResidentMerger(complete_material, out)
    plain = Recipe("regmean", {"one": 1.0, "two": 0.5})
    for groups in (GROUPS["depth"], ("layers:0-",), GROUPS["depth"]):
        merger.merge(grouped(plain, groups, 0.1))
        merger.merge(plain)
    assert len(prepared) == 2
    assert sum(prepared) == len(out)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"one@layers:0": 1.0, "two": 1.0}, "has no scaling factor of 'one'"),
        ({"one@layers:0-": 1.0, "one@*bias": 0.5, "two": 1.0}, "two scaling factors of 'one'"),
        ({"four@*": 1.0, "two": 1.0}, "'four' is no member"),
        ({"one@*atention*": 1.0, "one@*": 1.0}, "none of the merged weights"),
        ({"one@*bias": 1.0, "one@*": float("nan")}, r"scaling factor of 'one@\*'"),
        ({"one": float("inf"), "two": 1.0}, "scaling factor of 'one' = inf is not a finite number"),
        ({"one": float("-inf"), "two": 1.0}, "scaling factor of 'one' = -inf is not a finite number"),
    ],
)
def test_wrong_groups_are_named(material, scaling, message):
    with pytest.raises(MethodError, match=message):
        material.check(Recipe("task_arithmetic", scaling))


def test_figures_of_parts_are_those_of_the_whole():
    assert joined([{"ridge": 0.1, "ridged_layers": 2.0}, {"ridge": 0.3, "ridged_layers": 1.0, "residual.a": 0.5}]) == {
        "ridge": 0.3,
        "ridged_layers": 3.0,
        "residual.a": 0.5,
    }


def test_groups_trim_by_the_whole_model_also_where_histograms_are_coarse(save_base, save_member, tmp_path):
    base = save_base(tmp_path / "base", hidden_size=160, intermediate_size=168)
    members = {name: str(save_member(tmp_path / name, base, seed)) for seed, name in enumerate(("one", "two"))}
    wide = Material(Pool.open(str(base), members))
    out, expected = empty_out(wide.pool), empty_out(wide.pool)
    merger, reference = ResidentMerger(wide, out), ResidentMerger(wide, expected)
    for density in (0.2, 0.35):
        plain = Recipe("ties", {"one": 1.0, "two": 0.5}, {"density": density})
        reference.merge(plain)
        for groups in GROUPS.values():  # the second ones cut the first ones' parts
            merger.merge(grouped(plain, groups))
            assert all(torch.equal(out[name], expected[name]) for name in out)


def test_a_distilled_merge_is_not_taken_for_one_of_another_start(material, tmp_path):
    starts = [Recipe("task_arithmetic", {"one": factor, "two": 0.5}, {"normalize": 0.0}) for factor in (0.3, 0.7)]
    pool = material.pool
    weights = {name: pool.base_weight(name).clone() for name in pool.weights}
    settings = {"statistic": "distilled", "start": starts[0].as_dict()}
    path = str(tmp_path / "distilled.safetensors")
    checkpoint = subset_fingerprint(pool, ["one", "two"])
    save_tensors(path, "distilled", settings, weights, Partial(), checkpoint=checkpoint, data="")
    there = Material(pool, open_statistics(pool, {"one+two": [path]}))
    there.check(Recipe("distilled", {"one": 1.0, "two": 1.0}, {"start": starts[0].identity}))
    with pytest.raises(MethodError, match="started from another merge"):
        there.check(Recipe("distilled", {"one": 1.0, "two": 1.0}, {"start": starts[1].identity}))


@pytest.mark.parametrize("start", ["regmean", "ties"])
def test_a_start_is_the_same_on_disk_in_parts_and_in_memory(tmp_path, start):
    """RegMean's defaults follow the model type; TIES asks matrices of so many entries for more than a histogram."""
    config = transformers.T5Config(
        vocab_size=20, d_model=64, d_kv=32, d_ff=512, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    for who in ("one", "two"):
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn_like(value)
        model.save_pretrained(tmp_path / who)
    pool = Pool.open(str(tmp_path / "base"), {who: str(tmp_path / who) for who in ("one", "two")})
    about, files = Partial({}, {"examples": 8, "tokens": 8}), {}
    for who in pool.members:
        inputs = [name for name in pool.weights if name.endswith((".q.weight", ".wi.weight"))]
        rows = {name: torch.randn(80, 64) @ torch.randn(64, 64) for name in inputs}
        grams = {name: value.T @ value for name, value in rows.items()}
        path = str(tmp_path / f"{who}.safetensors")
        files[who] = save_tensors(path, "gram", {}, grams, about, checkpoint="", data="")
    material = Material(pool, {"gram": files})
    subspace = {"regmean": "gram", "ties": "identity"}[start]
    recipe = Recipe("mats", {"one": 1.0, "two": 1.0}, {"start": start, "iterations": 0, "subspace": subspace})
    out, parts = empty_out(pool), list(empty_out(pool).items())
    ResidentMerger(material, out).merge(recipe)
    merge_to_disk(material, recipe, str(tmp_path / "out"))
    SpreadMerger(material, [dict(parts[::2]), dict(parts[1::2])]).merge(recipe)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in parts:
        assert torch.equal(value, out[name]), name
        torch.testing.assert_close(written[name], out[name], rtol=1e-5, atol=1e-7)


def test_a_gram_is_zero_where_no_token_came_and_refused_where_it_is_not_known(complete_material, tiny_pool, tmp_path):
    pool = Pool.open(str(tiny_pool["base"]), {who: str(tiny_pool[who]) for who in ("one", "two")})
    grams = complete_material.statistics["gram"]
    recipe = METHODS["regmean"].default_recipe(["one", "two"])
    lost = next(name for name in pool.weights if name.endswith("output.dense.weight"))
    own = pool.members["two"].names[lost]
    stored = {name: grams["two"].read(name) for name in grams["two"].names if name not in grams["two"].shared}
    without = {name: value for name, value in stored.items() if name != own}

    def merged(tensors, **about):
        path = str(tmp_path / f"{len(tensors)}.{'.'.join(about)}.safetensors")
        counts = {"examples": 8, "tokens": 8}
        file = save_tensors(
            path,
            "gram",
            {},
            tensors,
            Partial(counts=counts, shared=dict(grams["two"].shared), **about),
            checkpoint="",
            data="",
        )
        out = empty_out(pool)
        ResidentMerger(Material(pool, {"gram": {"one": grams["one"], "two": file}}), out).merge(recipe)
        return out

    zeros = merged(stored | {own: torch.zeros_like(stored[own])})
    unreached = merged(without, unreached=(own,))
    assert all(torch.equal(value, unreached[name]) for name, value in zeros.items())
    for about in ({}, {"uncovered": (own,)}):
        with pytest.raises(MethodError, match=f"two: no gram for '{re.escape(lost)}', which other members have"):
            merged(without, **about)
