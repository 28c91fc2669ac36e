from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, GPT2Config, GPT2Model

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.mergers.shard import ShardMerger
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe

RANKS = {"a": 2, "b": 3, "c": 1}
SCALING = {"a": 0.7, "b": 0.4, "c": 1.1}
SHAPES = {
    "embeddings.word.weight": (30, 10),
    "layer.0.query.weight": (10, 10),
    "layer.0.up.weight": (16, 10),
    "layer.1.conv.weight": (10, 14),
    "layer.1.down.weight": (10, 16),
}


def adapters(seed=0, ranks=RANKS, grams=False):
    """Weights of members that are adapters; one of three leaves a weight alone, and nobody moves the last two."""
    g = torch.Generator().manual_seed(seed)
    weights = []
    for name, (rows, columns) in SHAPES.items():
        base = torch.randn(rows, columns, generator=g)
        factors = {}
        for member, rank in ranks.items():
            r = 0 if (member, name) == ("c", "layer.0.up.weight") else rank
            factors[member] = 0.3 * torch.randn(rows, r, generator=g), 0.3 * torch.randn(r, columns, generator=g)
        members = {member: base + left @ right for member, (left, right) in factors.items()}
        conv = "conv" in name
        inputs = rows if conv else columns
        x = {member: torch.randn(64, inputs, generator=g) for member in ranks}
        actual = {"gram": {m: v.T @ v / 64 for m, v in x.items()}} if grams and "embed" not in name else {}
        weights.append(Weight(name, base, members, actual, conv, factors))
    for name, shape in {"layer.0.query.bias": (10,), "pooler.weight": (10, 10)}.items():
        base = torch.randn(shape, generator=g)
        nothing = torch.empty(10, 0), torch.empty(0, base[0].numel())
        weights.append(Weight(name, base, dict.fromkeys(ranks, base), {}, False, dict.fromkeys(ranks, nothing)))
    return weights


def cores(weights, members):
    """Each adapted weight's core and the bases that it is expanded by, in float64, from SVDs of the stacked factors."""
    actual = {}
    for w in weights:
        pairs = {m: w.factors[m] for m in members}
        up = {m: (r.T if w.transposed else left).double() for m, (left, r) in pairs.items()}
        down = {m: (left.T if w.transposed else r).double() for m, (left, r) in pairs.items()}
        if not sum(v.shape[1] for v in up.values()):
            continue
        outputs = torch.linalg.svd(torch.cat(list(up.values()), dim=1), full_matrices=False)[0]
        inputs = torch.linalg.svd(torch.cat(list(down.values())), full_matrices=False)[2]
        moved = {m: outputs.T @ up[m] @ down[m] @ inputs.T for m in members}
        grams = {m: inputs @ v.double() @ inputs.T for m, v in w.statistics.get("gram", {}).items()}
        actual[w.name] = Weight(w.name, torch.zeros_like(moved[members[0]]), moved, {"gram": grams} if grams else {})
        actual[w.name + " bases"] = outputs, inputs
    return actual


def expanded(method, weights, parameters, reference):
    members = list(SCALING)
    actual = cores(weights, members)
    inner = [actual[w.name] for w in weights if w.name in actual]
    merged = getattr(reference, method)(inner, SCALING, parameters, {})
    result = {w.name: w.base.double() for w in weights}
    for w in weights:
        if w.name in merged:
            outputs, inputs = actual[w.name + " bases"]
            step = outputs @ merged[w.name] @ inputs
            result[w.name] = w.base.double() + (step.T if w.transposed else step)
    return result


@pytest.mark.parametrize("scaling", [SCALING, {"a": 1.0, "c": 0.5}, {"b": -0.3}])
def test_task_arithmetic_in_core_space_is_task_arithmetic(scaling, merge, assert_close):
    weights = adapters()
    assert_close(merge("core+task_arithmetic", weights, scaling), merge("task_arithmetic", weights, scaling))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tsv_m", {}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.6, "trim": "tensor"}),
        ("wudi", {}),
        ("regmean", {}),
        ("esm", {}),
    ],
)
def test_any_method_merges_cores_as_its_float64_reference(method, parameters, merge, complete, reference, assert_close):
    for seed in range(3):
        weights = adapters(seed, grams="gram" in METHODS[method].requires)
        expected = expanded(method, weights, complete(method, SCALING, parameters), reference)
        assert_close(merge(f"core+{method}", weights, SCALING, parameters), expected, tolerance=1e-4)


def test_iso_c_is_the_same_in_core_space_and_outside(merge, assert_close):
    weights = adapters()
    assert_close(merge("core+iso_c", weights, SCALING), merge("iso_c", weights, SCALING), tolerance=1e-4)


@pytest.mark.parametrize("method", ["core+tsv_m", "core+ties", "svc+core+tsv_m", "core+lines+ties", "core+dare"])
def test_parts_merged_apart_and_pools_of_fewer_members_are_the_same(method, merge, subset, assert_close):
    weights = adapters()
    whole = merge(method, weights, SCALING)
    assert_close(merge(method, weights, SCALING, parts=3), whole, tolerance=1e-6)
    some = {"b": 0.8, "c": 0.5}
    fewer = [replace(w, factors={m: w.factors[m] for m in some}) for w in subset(weights, some)]
    assert_close(merge(method, weights, some), merge(method, fewer, some), tolerance=1e-5)


def test_calibration_is_the_same_in_core_space_and_outside(merge, assert_close):
    weights = adapters()
    assert_close(merge("svc+core+tsv_m", weights, SCALING), merge("core+svc+tsv_m", weights, SCALING), tolerance=1e-4)


def test_a_candidate_has_the_same_bits_whatever_was_merged_before_it(merge):
    weights = adapters()
    method = METHODS["core+ties"]
    out = [{w.name: torch.empty(w.base.shape) for w in weights} for _ in range(2)]
    settings = method.default_recipe(list(SCALING)).parameters
    prepared = method.prepare(weights, Context())
    prepared.merge(SCALING, settings, out[0])
    prepared.merge({"a": 1.0}, settings, out[1])
    prepared.merge(SCALING, settings, out[1])
    assert all(torch.equal(out[0][name], out[1][name]) for name in out[0])


def held_in_full(weights):
    """With a bias that one member trained itself."""
    changed = []
    for w in weights:
        if w.name == "layer.0.query.bias":
            members = {**w.members, "b": w.base + 1}
            w = replace(w, members=members, factors={m: v for m, v in w.factors.items() if m != "b"})
        changed.append(w)
    return changed


@pytest.mark.parametrize("method", ["tsv_m", "task_arithmetic", "lines+task_arithmetic"])
def test_weights_that_a_member_holds_in_full_are_merged_by_the_method_itself(method, merge):
    weights = held_in_full(adapters())
    merged, plain = merge(f"core+{method}", weights, SCALING), merge(method, weights, SCALING)
    torch.testing.assert_close(merged["layer.0.query.bias"], plain["layer.0.query.bias"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("core+fisher", r"'fisher' uses fisher of whole weights.*leave out 'core\+'"),
        ("core+distilled", r"leave out 'core\+'"),
        ("core+core+ties", r"leave out 'core\+'"),
        ("core+ace", r"'ace' takes means or a softmax of rows.*leave out 'core\+'"),
        ("core+svc+arcee_fusion", r"signs.*leave out 'core\+'"),
    ],
)
def test_what_has_no_core_is_refused(name, message):
    with pytest.raises(MethodError, match=message):
        METHODS[name]


def test_a_method_that_looks_at_all_cores_refuses_weights_held_in_full(merge):
    with pytest.raises(MethodError, match=r"b holds 'layer\.0\.query\.bias' in full.*core\+tsv_m"):
        merge("core+lines+ties", held_in_full(adapters()), SCALING)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A pool of two adapters of unlike ranks on a GPT-2, whose matrices are stored [in, out]; and a merged member."""
    place = tmp_path_factory.mktemp("core")
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).save_pretrained(place / "base")
    for seed, (name, rank) in enumerate({"a": 2, "b": 3}.items()):
        torch.manual_seed(seed)
        targets = ["c_attn", "c_fc", "wte"] if name == "a" else ["c_attn", "c_proj"]
        config = LoraConfig(r=rank, lora_alpha=5, init_lora_weights=False, target_modules=targets, fan_in_fan_out=True)
        model = get_peft_model(AutoModel.from_pretrained(place / "base"), config)
        model.save_pretrained(place / name)
        model.merge_and_unload().save_pretrained(place / f"{name}-merged")
    return place


def live(pool):
    return {name: torch.empty(info.shape) for name, info in pool.weights.items()}


def test_adapters_that_peft_wrote_are_merged_without_loss(gpt2, tmp_path, assert_close):
    pool = Pool.open(str(gpt2 / "base"), {name: str(gpt2 / name) for name in "ab"})
    factors = {"a": 0.8, "b": 0.6}
    core, full = live(pool), live(pool)
    ResidentMerger(Material(pool), core).merge(Recipe("core+task_arithmetic", factors, {}))
    ResidentMerger(Material(pool), full).merge(Recipe("task_arithmetic", factors, {}))
    assert_close(core, full, tolerance=1e-6)
    merge_to_disk(Material(pool), Recipe("core+iso_c", factors, {}), str(tmp_path / "out"))
    ResidentMerger(Material(pool), full).merge(Recipe("iso_c", factors, {}))
    written = Checkpoint.open(str(tmp_path / "out"))
    assert_close({name: written.read(name) for name in full}, full, tolerance=1e-3)


@pytest.mark.parametrize("method", ["core+ties", "svc+core+ties", "svc+lines+ties", "core+tsv_m"])
def test_shards_of_a_pool_merge_as_the_whole(method, gpt2, assert_close):
    material = Material(Pool.open(str(gpt2 / "base"), {name: str(gpt2 / name) for name in "ab"}))
    recipe = METHODS[method].complete(Recipe(method, {"a": 0.8, "b": 0.6}, {}), "gpt2")
    whole = live(material.pool)
    ResidentMerger(material, whole).merge(recipe)
    names = list(material.pool.weights)
    shards = [ShardMerger(material, part) for part in (names[::2], names[1::2])]
    all_stats = [shard.global_pass(method) for shard in shards]
    for shard in shards:
        shard.settle(method, all_stats)
    more = [shard.second_pass(recipe) for shard in shards]
    for shard in shards:
        shard.merge_part(recipe, more)
    merged = {name: value for shard in shards for name, value in shard._out.items()}
    assert_close(merged, whole, tolerance=1e-6)


def test_a_member_that_is_no_adapter_is_named_with_the_remedy(gpt2):
    pool = Pool.open(str(gpt2 / "base"), {"a": str(gpt2 / "a"), "b": str(gpt2 / "b-merged")})
    with pytest.raises(MethodError, match=r"b is a whole model: name the adapters' own directories.*or use 'ties'"):
        Material(pool).check(Recipe("core+ties", {"a": 1.0, "b": 1.0}, {}))


@pytest.mark.parametrize(
    "method", [name for name in METHODS if f"core+{name}" in METHODS and METHODS[name].most_members is None]
)
def test_the_order_and_the_signs_of_an_adapter_s_directions_make_no_difference(method, merge, assert_close):
    """They are as arbitrary as the signs of a basis."""
    weights = adapters(1, grams="gram" in METHODS[method].requires)
    turned = [
        replace(w, factors={m: (-left.flip(1), -right.flip(0)) for m, (left, right) in w.factors.items()})
        for w in weights
    ]
    assert_close(merge(f"core+{method}", turned, SCALING), merge(f"core+{method}", weights, SCALING), tolerance=1e-4)
