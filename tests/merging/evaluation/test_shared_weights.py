import sys
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merging.checkpoints.models.parameter_names import in_checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import PoolError, TaskError
from merging.evaluation.live_models import LiveModels
from merging.evaluation.shared_weights import share_weights
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.tasks import CustomSettings, make_task
from tests.merging.evaluation.tiny_models import FAMILIES, Family

RECIPE = Recipe("task_arithmetic", {"one": 0.7, "two": 0.4})


@pytest.fixture
def probe(monkeypatch):
    """An importable module whose `score` remembers what a model gives for some inputs: set its `family` first."""
    module = ModuleType("live_probe")

    def score(model, checkpoint, split, limit):
        module.seen = module.family.output(model)
        return float(module.seen.mean())

    module.score = score
    monkeypatch.setitem(sys.modules, "live_probe", module)
    return module


def written(family: Family, directory) -> dict[str, str]:
    models = {"base": family.make(), "one": family.changed(1), "two": family.changed(2)}
    for name, model in models.items():
        model.save_pretrained(directory / name)
    return {name: str(directory / name) for name in models}


def opened(paths: dict[str, str], heads=()) -> Material:
    return Material(Pool.open(paths["base"], {name: path for name, path in paths.items() if name != "base"}, heads))


def live_models(material: Material, auto: str, *owners: str, dtype: torch.dtype | None = None) -> LiveModels:
    tasks = [
        make_task(owner, CustomSettings(evaluator="live_probe:score", model_class=auto), str(checkpoint.path))
        for owner in owners
        for checkpoint in [material.pool.members[owner].checkpoint]
    ]
    return LiveModels(material, tasks, {owner: owner for owner in owners}, torch.device("cpu"), dtype=dtype)


SELDOM = {"bert_mlm", "modernbert", "qwen2", "qwen3", "gemma2", "phi3", "mamba", "bart", "dinov2", "resnet", "gpt_oss"}
"""Families whose weights lie as those of others do."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in FAMILIES]
)
def test_the_live_model_is_the_exported_one(name, tmp_path, probe):
    family = probe.family = FAMILIES[name]
    paths = written(family, tmp_path)
    material = opened(paths)
    merge_to_disk(material, RECIPE, str(tmp_path / "merged"))
    live = live_models(material, family.auto, "one", "two")
    seen = []
    for recipe, where in ((RECIPE, "merged"), (member_recipe("two"), "two"), (base_recipe(), "base")):
        score = live.measure(recipe, "validation").scores["one"].value
        stored = getattr(transformers, family.auto).from_pretrained(tmp_path / where, dtype=torch.float32).eval()
        torch.testing.assert_close(probe.seen, family.output(stored), rtol=1e-5, atol=1e-5)
        assert score == pytest.approx(float(family.output(stored).mean()), abs=1e-5)
        seen.append(probe.seen)
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)


QUICK = {"llama", "llama_tied", "bert", "mixtral", "deepseek_v3", "t5", "vit"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]
)
def test_of_a_16_bit_pool_the_live_model_is_the_exported_one_as_transformers_loads_it(name, dtype, tmp_path, probe):
    family = probe.family = FAMILIES[name]
    auto = getattr(transformers, family.auto)
    for where, model in {"base": family.make(), "one": family.changed(1), "two": family.changed(2)}.items():
        model.to(dtype).save_pretrained(tmp_path / where)
    material = opened({name: str(tmp_path / name) for name in ("base", "one", "two")})
    recipe = Recipe("ties", {"one": 0.7, "two": 0.4})
    merge_to_disk(material, recipe, str(tmp_path / "merged"))
    own = live_models(material, family.auto, "one", "two")
    own.measure(recipe, "validation")
    stored = auto.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    assert torch.equal(probe.seen, family.output(stored))
    wide = live_models(material, family.auto, "one", "two", dtype=torch.float32)
    wide.measure(recipe, "validation")
    stored = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(probe.seen, family.output(stored), rtol=1e-5, atol=1e-6)


def test_weights_of_several_dtypes_are_scored_as_they_are_exported(tmp_path, probe):
    """Norms in float32 beside bfloat16; then one matrix in float16 besides."""
    family = probe.family = FAMILIES["llama"]
    paths = written(family, tmp_path)
    for where in paths:
        file = tmp_path / where / "model.safetensors"
        halved = {
            name: value if "norm" in name else value.to(torch.bfloat16) for name, value in load_file(file).items()
        }
        save_file(halved, file, metadata={"format": "pt"})
    material = opened(paths)
    merge_to_disk(material, RECIPE, str(tmp_path / "merged"))
    auto = transformers.AutoModelForCausalLM
    live_models(material, family.auto, "one").measure(RECIPE, "validation")
    assert torch.equal(
        probe.seen, family.output(auto.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval())
    )
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float16)
    save_file(tensors, file, metadata={"format": "pt"})
    material = opened(paths)
    merge_to_disk(material, RECIPE, str(tmp_path / "again"))
    live_models(material, family.auto, "one").measure(RECIPE, "validation")
    assert torch.equal(probe.seen, family.output(auto.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()))


def renamed(directory, change) -> None:
    """Rewrites a checkpoint's names."""
    file = directory / "model.safetensors"
    save_file({change(name): value.clone() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


OLD_NAMES = {
    "llava": lambda name: (
        f"language_model.{name}"
        if name == "lm_head.weight"
        else name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
    ),
    "gpt2": lambda name: name.removeprefix("transformer."),
    "bert": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
}


ALL = ("base", "one", "two")


@pytest.mark.parametrize("which", [ALL, ("base",), ("one", "two"), ("one",)])
@pytest.mark.parametrize("name", ["bert", "llava", "gpt2"])
def test_checkpoints_of_older_names(name, which, tmp_path, probe):
    family = probe.family = FAMILIES[name]
    paths = written(family, tmp_path)
    count = len(opened(paths).pool.weights)
    for member in which:
        renamed(tmp_path / member, OLD_NAMES[name])
    material = opened(paths)
    assert len(material.pool.weights) == count
    merge_to_disk(material, RECIPE, str(tmp_path / "merged"))
    live_models(material, family.auto, "two").measure(RECIPE, "validation")
    stored = getattr(transformers, family.auto).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(probe.seen, family.output(stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("which", "differ"), [(ALL, False), (("one",), True), (("one", "two"), False)])
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama_tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("t5", "shared.weight", "lm_head.weight"),
        ("t5", "shared.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_tied_weights_that_are_stored_twice(name, first, second, which, differ, tmp_path, probe):
    family = probe.family = FAMILIES[name]
    paths = written(family, tmp_path)
    for member in which:
        file = tmp_path / member / "model.safetensors"
        tensors = load_file(file)
        tensors[second] = tensors[first] + 0.1 * differ
        save_file(tensors, file, metadata={"format": "pt"})
    material = opened(paths)
    merge_to_disk(material, RECIPE, str(tmp_path / "merged"))
    stored = getattr(transformers, family.auto).from_pretrained(tmp_path / "merged").eval()
    for owner in ("one", "two"):
        live_models(material, family.auto, owner).measure(RECIPE, "validation")
        torch.testing.assert_close(probe.seen, family.output(stored), rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_kept_is_the_owner_s(tmp_path, probe):
    family = probe.family = FAMILIES["mixtral"]
    paths = written(family, tmp_path)
    kept = "model.layers.0.block_sparse_moe.experts.1.*"
    live = live_models(opened(paths, [kept]), family.auto, "one", "two")
    for owner in ("one", "two"):
        expected = family.changed(1 if owner == "one" else 2)
        base = family.make()
        with torch.no_grad():
            for name, value in expected.named_parameters():
                rest = base.get_parameter(name).clone()
                if name.startswith("model.layers.0.mlp.experts."):
                    rest[1] = value[1]
                value.copy_(rest)
        live.measure(RECIPE, "validation")
        live.measure(base_recipe(), "validation")
        if owner == "two":  # the task that is measured last
            torch.testing.assert_close(probe.seen, family.output(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "qwen3_moe", "deepseek_v3", "t5"])
def test_gradients_are_those_of_the_checkpoint_s_tensors(name, tmp_path):
    family = FAMILIES[name]
    paths = written(family, tmp_path)
    pool = opened(paths).pool
    model = getattr(transformers, family.auto).from_pretrained(paths["one"])
    out = {weight: pool.member_weight("two", weight).clone() for weight in pool.weights}
    shared = share_weights(model, pool, pool.members["one"], out)
    shared.track_gradients()
    shared.check(out)
    reference = getattr(transformers, family.auto).from_pretrained(paths["two"])
    for live in (model, reference):
        ids = torch.arange(3, 15)[None]
        live(input_ids=ids, labels=ids).loss.backward()
    gradients = shared.take_gradients()
    expected = in_checkpoint(reference, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
    assert expected.keys() <= gradients.keys()
    for weight, value in expected.items():
        torch.testing.assert_close(gradients[weight], value, rtol=1e-4, atol=1e-6)
    assert not shared.take_gradients()


def test_a_weight_in_no_model_is_refused(tmp_path, probe):
    material = opened(written(FAMILIES["llama"], tmp_path))
    with pytest.raises(PoolError, match=r"1 merged weights are in no task's model \(lm_head.weight\).*model_class"):
        live_models(material, "AutoModel", "one")


def test_a_weight_that_transformers_ignores_need_be_in_no_model(tmp_path, probe):
    family = probe.family = FAMILIES["deepseek_v3"]
    paths = written(family, tmp_path)
    for where in paths:
        file = tmp_path / where / "model.safetensors"
        more = {"model.layers.61.eh_proj.weight": torch.ones(4, 4)}
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
    material = opened(paths)
    assert "model.layers.61.eh_proj.weight" in material.pool.weights
    live_models(material, family.auto, "one").measure(RECIPE, "validation")


@pytest.mark.parametrize(
    ("name", "missing"), [("llama", "lm_head.weight"), ("bert", "classifier.bias"), ("mixtral", "w2.weight")]
)
def test_a_weight_that_no_checkpoint_brings_is_refused(name, missing, tmp_path, probe):
    family = FAMILIES[name]
    paths = written(family, tmp_path)
    for where in paths:
        file = tmp_path / where / "model.safetensors"
        kept = {key: value for key, value in load_file(file).items() if not key.endswith(missing)}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(TaskError, match="lacks .* weights of"):
        live_models(opened(paths), family.auto, "one")
