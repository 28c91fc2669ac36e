"""Pickled checkpoints become safetensors with every tensor and every other file."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flows.cli.convert import convert_checkpoint
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import CheckpointError, SettingsError

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


@pytest.fixture
def pickled(tmp_path):
    """A language model with its head, saved as a pickle; returns the directory and the model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False)).to(torch.bfloat16).eval()
    path = tmp_path / "pickled"
    model.save_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    torch.save({"lr": 1.0}, path / "optimizer.pt")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "spm.model").write_bytes(b"pieces")
    return path, model


def convert(path, out, **options):
    convert_checkpoint(str(path), str(out), Display(), **options)


def test_a_head_and_every_other_file_stay(pickled, tmp_path):
    path, model = pickled
    convert(path, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result.keys() == model.state_dict().keys()
    assert all(torch.equal(result[name], value) for name, value in model.state_dict().items())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert (tmp_path / "out" / "spm.model").read_bytes() == b"pieces"
    assert not list((tmp_path / "out").glob("*.bin"))
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_shards_tied_and_transposed_tensors(pickled, tmp_path):
    path, model = pickled
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = torch.ones(16, 2, dtype=torch.bfloat16)[:, 0]
    (path / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(path, tmp_path / "out", max_shard_bytes=2000)
    result = Checkpoint.open(str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert result.tensors.keys() == state.keys()
    assert all(torch.equal(result.read(name), value) for name, value in state.items())
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin"):
        convert(path, tmp_path / "again")


def test_an_adapter(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "lora" / "adapter_model.bin")
    convert(tmp_path / "lora", tmp_path / "out")
    assert torch.equal(
        load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.x.lora_A.weight"], torch.ones(2, 3)
    )
    assert (tmp_path / "out" / "adapter_config.json").exists()


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_of_a_pickle_runs(pickled, tmp_path, monkeypatch):
    path, _ = pickled
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Runs()}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_what_is_refused(pickled, tmp_path):
    path, _ = pickled
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(SettingsError, match="not empty"):
        convert(path, tmp_path / "full")
    (path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert(path, tmp_path / "out")
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert(path, tmp_path / "out")
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        convert(path, tmp_path / "out")


def test_the_refusal_of_pickles_names_the_command(pickled):
    with pytest.raises(CheckpointError, match="mergequest convert .* --out NEW"):
        Checkpoint.open(str(pickled[0]))
