import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    Qwen2MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from merging.checkpoints.checkpoint import SINGLE, Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import MergequestError, MethodError, PoolError
from merging.mergers.slices import Slice, layers, write_slices

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
MOE = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=4),
    "gemma2": Gemma2Config(**SIZES, num_hidden_layers=4, head_dim=8, sliding_window=3, attn_implementation="eager"),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=32),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **MOE, num_hidden_layers=4, mlp_only_layers=[0, 2]),
}
STACKS = {"gpt2": "transformer.h"}
PICKS = [("base", 0), ("base", 1), ("math", 2), ("math", 3), ("base", 2), ("base", 3)]
SLICES = [Slice("base", 0, 1, {}), Slice("math", 2, None, {}), Slice("base", 2, 3, {})]


def save(path, config, seed):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def pool_of(tmp_path, config):
    return Pool.open(save(tmp_path / "base", config, 0), {"math": save(tmp_path / "math", config, 1)})


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_layers_compute_what_they_did(kind, tmp_path):
    """Against the base's modules, with the members' put into their list: sliding and full attention, experts and none."""
    pool = pool_of(tmp_path, CONFIGS[kind])
    assert write_slices(pool, SLICES, str(tmp_path / "out")) == len(PICKS)
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("base", "math")}
    stack = STACKS.get(kind, "model.layers")
    expected = models["base"]
    modules = nn.ModuleList(models[who].get_submodule(stack)[layer] for who, layer in PICKS)
    holder, _, attribute = stack.rpartition(".")
    setattr(expected.get_submodule(holder), attribute, modules)
    tokens = torch.arange(16).reshape(2, 8)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    if getattr(expected.config, "layer_types", None):
        expected.config.layer_types = result.config.layer_types
        types = CONFIGS[kind].layer_types
        assert result.config.layer_types == [types[layer] for _, layer in PICKS]
    expected.config.num_hidden_layers = len(PICKS)
    assert result.config.num_hidden_layers == len(PICKS)
    with torch.no_grad():
        torch.testing.assert_close(
            result(tokens, use_cache=False).logits, expected(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-6
        )


def test_weights_are_scaled_in_float32_and_rounded_once(tmp_path):
    pool = pool_of(tmp_path, CONFIGS["llama"])
    parts = [Slice("math", 1, 1, {"*.o_proj.weight": 0.3, "*norm*": 0.5}), Slice("base", 0, 0, {"*": 0.7})]
    write_slices(pool, parts, str(tmp_path / "out"), rest="math", dtype=torch.bfloat16)
    base, math, out = (load_file(tmp_path / name / SINGLE) for name in ("base", "math", "out"))
    for name, value in out.items():
        number = name.split(".")[2] if ".layers." in name else ""
        original = name.replace(f"layers.{number}.", f"layers.{1 - int(number)}.") if number else name
        scale = {"0": 0.3 if "o_proj" in name else 0.5 if "norm" in name else 1.0, "1": 0.7}.get(number, 1.0)
        wanted = (base if number == "1" else math)[original] * scale
        assert torch.equal(value, wanted.bfloat16()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (2, "bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 2


def test_fewer_layers_of_an_encoder_and_several_files(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
    BertModel(BertConfig(**sizes, num_hidden_layers=3)).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(str(tmp_path / "base"))
    write_slices(Pool(base, {}, base.tensors), [Slice("base", 2, 2, {})], str(tmp_path / "out"), max_shard_bytes=4000)
    model, info = BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.encoder.layer) == 1
    assert torch.equal(
        model.encoder.layer[0].attention.self.query.weight, base.read("encoder.layer.2.attention.self.query.weight")
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Slice("meth", 0, 0, {}), "'meth' is no member. Did you mean 'math'"),
        (Slice("math", 2, 4, {}), r"slices.0.layers: the models have layers 0-3, not 2-4"),
        (Slice("math", 0, 0, {"*.out.weight": 0.5}), r"'\*.out.weight' has none of the weights of layer 0"),
        (Slice("math", 0, 0, {"*norm*": 0.5, "*.weight": 0.5}), r"meant by both"),
    ],
)
def test_what_is_not_there_is_named(part, message, tmp_path):
    with pytest.raises(MethodError, match=message):
        write_slices(pool_of(tmp_path, CONFIGS["llama"]), [part], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by",
        ),
        (
            GPTNeoConfig(
                vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
            ),
            "attention_types",
        ),
    ],
)
def test_layers_that_depend_on_their_place_are_refused(config, message, tmp_path):
    with pytest.raises(MethodError, match=message):
        write_slices(pool_of(tmp_path, config), [Slice("base", 0, 0, {})], str(tmp_path / "out"))


def test_two_stacks_are_refused(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(str(tmp_path / "base"))
    with pytest.raises(MethodError, match=r"several \((decoder|encoder)\.block\., (decoder|encoder)\.block\.\)"):
        write_slices(Pool(base, {}, base.tensors), [Slice("base", 0, 0, {})], str(tmp_path / "out"))


def test_a_damaged_weight_is_named(tmp_path):
    pool = pool_of(tmp_path, CONFIGS["llama"])
    tensors = load_file(tmp_path / "math" / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "math" / SINGLE, metadata={"format": "pt"})
    with pytest.raises(PoolError, match=r"math: 'model.layers.1.mlp.up_proj.weight' holds NaN"):
        write_slices(pool, [Slice("math", 0, None, {})], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layers_are_written_as_in_scaling_groups():
    assert [layers(text) for text in ("3", "0-2", "9-")] == [(3, 3), (0, 2), (9, None)]
    for wrong in ("", "a", "2-1", "-3", "1-2-3"):
        with pytest.raises(MergequestError, match="names no layers"):
            layers(wrong)
