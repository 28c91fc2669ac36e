import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.mergers.adapter_export import write_adapter
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.recipe import Recipe

MODELS = {
    "gpt2": (
        lambda: GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)),
        (["c_attn", "c_fc", "wte"], ["c_attn", "c_proj"]),
    ),
    "bert": (
        lambda: BertModel(
            BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
        ),
        (["query", "value"], ["query", "dense"]),
    ),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def place(request, tmp_path_factory):
    """Two adapters of unlike ranks and layers on a base; and one of them merged into it."""
    place = tmp_path_factory.mktemp(request.param)
    build, targets = MODELS[request.param]
    torch.manual_seed(0)
    build().save_pretrained(place / "base")
    for seed, (name, rank) in enumerate({"a": 2, "b": 3}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=5,
            init_lora_weights=False,
            target_modules=targets[seed],
            fan_in_fan_out=request.param == "gpt2",
        )
        model = get_peft_model(AutoModel.from_pretrained(place / "base"), config)
        model.save_pretrained(place / name)
        model.merge_and_unload().save_pretrained(place / f"{name}-merged")
    return place


def merged_by(pool, recipe):
    out = {name: torch.empty(info.shape) for name, info in pool.weights.items()}
    ResidentMerger(Material(pool), out).merge(recipe)
    return out


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("task_arithmetic", {"a": 0.8, "b": 0.6}, {}),
        Recipe("core+tsv_m", {"a": 1.0, "b": 1.0}, {}),
        Recipe("core+ties", {"a": 1.0, "b": 0.5}, {}),
        Recipe("core+task_arithmetic", {"a": 1.0}, {}),
    ],
    ids=lambda recipe: f"{recipe.method} of {len(recipe.scaling)}",
)
def test_peft_and_we_read_back_the_merge(place, tmp_path, recipe, assert_close):
    pool = Pool.open(str(place / "base"), {name: str(place / name) for name in "ab"})
    wanted = merged_by(pool, recipe)
    ranks = write_adapter(
        pool, recipe.members, wanted.__getitem__, str(tmp_path / "out"), {"recipe.yaml": "method: x\n"}
    )
    assert max(ranks.values()) <= 5
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "method: x\n"
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(place / "base"), tmp_path / "out").merge_and_unload()
    theirs = dict(model.named_parameters())
    assert_close({name: theirs[name].detach() for name in wanted}, wanted, tolerance=1e-5)
    again = Pool.open(str(place / "base"), {"out": str(tmp_path / "out")})
    assert_close({name: again.member_weight("out", name) for name in wanted}, wanted, tolerance=1e-5)


def test_what_no_adapter_holds_is_refused(place, tmp_path):
    pool = Pool.open(str(place / "base"), {"a": str(place / "a"), "b": str(place / "b-merged")})
    recipe = Recipe("task_arithmetic", {"a": 0.8, "b": 0.6}, {})
    with pytest.raises(MethodError, match="'b' is a whole model"):
        write_adapter(pool, recipe.members, merged_by(pool, recipe).__getitem__, str(tmp_path / "out"))
    pool = Pool.open(str(place / "base"), {name: str(place / name) for name in "ab"})
    ties = merged_by(pool, Recipe("ties", {"a": 1.0, "b": 1.0}, {"density": 0.2}))
    with pytest.raises(MethodError, match="higher rank than its members' together"):
        write_adapter(pool, ["a", "b"], ties.__getitem__, str(tmp_path / "out"))
    same = merged_by(pool, Recipe("task_arithmetic", {"a": 0.0, "b": 0.0}, {}))
    with pytest.raises(MethodError, match="the base itself"):
        write_adapter(pool, ["a", "b"], same.__getitem__, str(tmp_path / "out"))
    bias = next(name for name in pool.weights if name.endswith(".bias"))
    moved = {**same, bias: same[bias] + 1.0}
    with pytest.raises(MethodError, match="no matrix of a layer"):
        write_adapter(pool, ["a", "b"], moved.__getitem__, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
