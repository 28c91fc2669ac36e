"""Codes of quantised weights are never merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from merging.checkpoints.checkpoint import SINGLE, Checkpoint
from merging.errors import CheckpointError

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


@pytest.fixture
def plain(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, tensors=(), without=(), **settings):
    values = {name: value for name, value in load_file(path / SINGLE).items() if name not in without}
    save_file(values | dict(tensors), path / SINGLE, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("bitsandbytes", "model.dequantize().save_pretrained"),
        ("fp8", "FineGrainedFP8Config(dequantize=True)"),
        ("mxfp4", "Mxfp4Config(dequantize=True)"),
        ("gptq", "take the checkpoint that it was quantised from"),
        ("awq", "take the checkpoint that it was quantised from"),
        ("something-new", "LlamaForCausalLM.from_pretrained"),
    ],
)
def test_every_quantisation_config_is_refused(plain, method, remedy, nested):
    settings = {"quantization_config": {"quant_method": method, "bits": 4}}
    rewrite(plain, **({"text_config": settings} if nested else settings))
    with pytest.raises(CheckpointError, match=method) as raised:
        Checkpoint.open(str(plain))
    assert remedy in str(raised.value)


def packed(name):
    stem = WEIGHT.removesuffix("weight")
    codes = torch.ones(16, 8, dtype=torch.uint8)
    return {
        "bnb4": {WEIGHT: codes.reshape(-1, 1), WEIGHT + ".absmax": torch.ones(4)},
        "bnb8": {WEIGHT: torch.ones(16, 16, dtype=torch.int8), stem + "SCB": torch.ones(16)},
        "gptq": {stem + "qweight": torch.ones(2, 16, dtype=torch.int32), stem + "scales": torch.ones(1, 16)},
        "fp8": {WEIGHT: torch.ones(16, 16).to(torch.float8_e4m3fn), WEIGHT + "_scale_inv": torch.ones(1, 1)},
        "mxfp4": {stem + "weight_blocks": codes, stem + "weight_scales": torch.ones(16, 1, dtype=torch.uint8)},
    }[name]


@pytest.mark.parametrize("name", ["bnb4", "bnb8", "gptq", "fp8", "mxfp4"])
def test_packed_weights_without_a_word_in_the_configuration_are_refused(plain, name):
    rewrite(plain, packed(name), without=[WEIGHT])
    with pytest.raises(CheckpointError, match=r"quantised.*q_proj.*Dequantise it first"):
        Checkpoint.open(str(plain))


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "uint32", "uint16", "complex64"])
def test_dtypes_that_are_not_read_are_named(plain, dtype):
    value = torch.ones(4, dtype=torch.uint8).view(getattr(torch, dtype)) if "8m0" in dtype else torch.ones(4)
    rewrite(plain, {"model.scales": value.to(getattr(torch, dtype))})
    with pytest.raises(CheckpointError, match=r"'model.scales' has dtype '\w+', which is not read.*dequantise"):
        Checkpoint.open(str(plain))


def test_masks_counts_and_indices_are_no_codes(plain):
    buffers = {
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "model.position_ids": torch.arange(8, dtype=torch.int32)[None],
        "model.norm.num_batches_tracked": torch.tensor(3),
        "model.layers.0.relative_position_index": torch.ones(4, 4, dtype=torch.int64),
    }
    rewrite(plain, buffers)
    assert buffers.keys() <= Checkpoint.open(str(plain)).tensors.keys()
