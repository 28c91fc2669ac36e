import json
import pickle
import shutil
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from merging.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from merging.errors import CheckpointError


@pytest.fixture
def copied(tiny_pool, tmp_path):
    """A member's directory that a test may damage."""
    return shutil.copytree(tiny_pool["one"], tmp_path / "one")


def test_reads_what_safetensors_reads(tiny_pool):
    checkpoint = Checkpoint.open(str(tiny_pool["one"]))
    expected = load_file(tiny_pool["one"] / SINGLE)
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())


def test_reading_never_writes_through(copied):
    before = (copied / SINGLE).read_bytes()
    checkpoint = Checkpoint.open(str(copied))
    checkpoint.read("classifier.weight").zero_()
    assert (copied / SINGLE).read_bytes() == before


def test_fingerprint_follows_a_single_bit(copied):
    before = Checkpoint.open(str(copied)).fingerprint
    values = load_file(copied / SINGLE)
    values["classifier.bias"][0] = torch.nextafter(values["classifier.bias"][0], torch.tensor(9.0))
    save_file(values, copied / SINGLE)
    assert Checkpoint.open(str(copied)).fingerprint != before


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint directory at .*nowhere.*hf download"):
        Checkpoint.open(str(tmp_path / "nowhere"))


def test_missing_config(copied):
    (copied / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        Checkpoint.open(str(copied))


def test_a_config_that_is_no_object(copied):
    (copied / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list"):
        Checkpoint.open(str(copied))


def test_adapter_is_named(copied):
    (copied / "config.json").rename(copied / "adapter_config.json")
    with pytest.raises(CheckpointError, match="It is an adapter"):
        Checkpoint.open(str(copied))


@pytest.mark.parametrize(
    ("saved", "kept"),
    [
        ("wrapper", ""),
        ("wrapper", "base_model.model."),
        ("model", "lora_"),
        ("model", "base_layer"),
        ("model", "to_save"),
    ],
)
def test_a_model_saved_in_its_wrapper_is_refused_with_the_remedy(copied, saved, kept):
    """Whole, or what a script kept of it."""
    model = AutoModelForSequenceClassification.from_pretrained(copied)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    state = (adapted if saved == "wrapper" else adapted.get_base_model()).state_dict()
    state = {name: value.clone() for name, value in state.items() if kept in name}
    save_file(state, copied / SINGLE)
    with pytest.raises(CheckpointError, match=r"one is the state of a model in PEFT's wrapper .*merge_and_unload\(\)"):
        Checkpoint.open(str(copied))
    adapted.merge_and_unload().save_pretrained(copied)
    assert Checkpoint.open(str(copied)).architecture == "BertForSequenceClassification"


def test_missing_weights(copied):
    (copied / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="the download is incomplete"):
        Checkpoint.open(str(copied))


@pytest.mark.parametrize("kept", [0, 5, 100, 5000])
def test_truncated_file(copied, kept):
    data = (copied / SINGLE).read_bytes()
    (copied / SINGLE).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(str(copied))


def test_last_tensor_cut_off_is_named(copied):
    data = (copied / SINGLE).read_bytes()
    (copied / SINGLE).write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="truncated: '.+' ends at byte"):
        Checkpoint.open(str(copied))


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b"[1, 2]",
    ],
)
def test_damaged_header(copied, header):
    (copied / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Checkpoint.open(str(copied))


def test_pickle_is_refused(copied):
    (copied / SINGLE).rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"as a pickle \(pytorch_model.bin\).*mergequest convert"):
        Checkpoint.open(str(copied))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", ".."])
def test_index_must_stay_inside(copied, file):
    (copied / SINGLE).unlink()
    (copied / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="names a file outside its directory"):
        Checkpoint.open(str(copied))


def test_index_names_a_missing_file(copied):
    (copied / SINGLE).unlink()
    (copied / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks model-00001-of-00002.safetensors"):
        Checkpoint.open(str(copied))


def test_unreadable_index(copied):
    (copied / SINGLE).unlink()
    (copied / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="is not an index"):
        Checkpoint.open(str(copied))


def test_what_is_pickled_holds_no_weights(tiny_pool):
    """Pools travel to workers, which read the files themselves."""
    checkpoint = Checkpoint.open(str(tiny_pool["base"]))
    before = len(pickle.dumps(checkpoint))
    name = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].nbytes)
    value = checkpoint.read(name)
    assert len(pickle.dumps(checkpoint)) == before
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint)).read(name), value)
