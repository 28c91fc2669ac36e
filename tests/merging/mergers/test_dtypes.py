import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from merging.checkpoints.pool import Pool
from merging.mergers.disk import merge_to_disk
from merging.mergers.dtypes import merged_bytes, model_dtype, rounded_dtype, views
from merging.mergers.material import Material
from merging.mergers.shard import ShardMerger
from merging.recipe import Recipe, base_recipe, member_recipe

CONFIG = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
HALF = {"one": 0.5, "two": 0.5}
RECIPES = [
    base_recipe(),
    member_recipe("two"),
    *(Recipe(method, HALF) for method in ("task_arithmetic", "breadcrumbs", "slerp")),
]


def pool_of(root, stored) -> Pool:
    """A pool whose tensors are stored as `stored(name)` says."""
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(root / name)
        file = root / name / "model.safetensors"
        tensors = {key: value.to(stored(key)) for key, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return Pool.open(str(root / "base"), {name: str(root / name) for name in ("one", "two")})


def mixed(name) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16


@pytest.mark.parametrize(
    "stored",
    [lambda name: torch.bfloat16, lambda name: torch.float16, lambda name: torch.float32, mixed],
    ids=["bfloat16", "float16", "float32", "mixed"],
)
def test_what_shards_send_is_what_is_exported(tmp_path, stored):
    pool = pool_of(tmp_path, stored)
    names = list(pool.weights)
    merger = ShardMerger(Material(pool), names)
    assert merger.values.nbytes == merged_bytes(pool.weights, names) == sum(i.nbytes for i in pool.weights.values())
    for number, recipe in enumerate(RECIPES):
        merger.settle(recipe.method, [merger.global_pass(recipe.method)]) if recipe.method == "breadcrumbs" else None
        merger.merge_part(recipe)
        sent = views(merger.values.clone(), pool.weights, names)
        if number < 2:
            expected = {name: pool.member_weight("two", name) if number else pool.base_weight(name) for name in names}
        else:
            merge_to_disk(Material(pool), recipe, str(tmp_path / str(number)))
            expected = load_file(tmp_path / str(number) / "model.safetensors")
        for name in names:
            assert sent[name].dtype == expected[name].dtype
            assert torch.equal(sent[name], expected[name]), (recipe, name)


def test_models_have_the_dtype_of_most_entries(tmp_path):
    assert model_dtype(pool_of(tmp_path / "mixed", mixed)) == torch.bfloat16
    few = pool_of(tmp_path / "few", lambda name: torch.float16 if "norm" in name else torch.float32)
    assert model_dtype(few) == torch.float32
    both = pool_of(tmp_path / "both", lambda name: torch.float16 if "norm" in name else torch.bfloat16)
    assert model_dtype(both) == torch.float32  # neither holds the other's values
    double = pool_of(tmp_path / "double", lambda name: torch.float64)
    assert {rounded_dtype(info) for info in double.weights.values()} == {torch.float32}
