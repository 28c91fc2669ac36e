"""mergekit's configurations and options through the command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli.app import app
from flows.config.recipe_file import load_recipe
from merging.checkpoints.checkpoint import Checkpoint

runner = CliRunner()


def call(*words):
    result = runner.invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def configuration(tiny_pool, tmp_path):
    """Writes a mergekit configuration of the tiny pool; weights grow with depth."""

    def write(**changes):
        value = {
            "merge_method": "task_arithmetic",
            "base_model": str(tiny_pool["base"]),
            "models": [
                {"model": str(tiny_pool["one"]), "parameters": {"weight": [0.0, 1.0]}},
                {"model": str(tiny_pool["two"]), "parameters": {"weight": 0.5}},
            ],
            **changes,
        }
        path = tmp_path / "theirs.yaml"
        path.write_text(yaml.safe_dump(value))
        return path

    return write


def expected(tiny_pool, name):
    """θ_0 + Σ w_t (θ_t − θ_0) in float64, as mergekit documents it."""
    base = Checkpoint.open(str(tiny_pool["base"])).read(name).double()
    weight = 1.0 if ".layer.1." in name else 0.0
    own = [Checkpoint.open(str(tiny_pool[member])).read(f"bert.{name}").double() for member in ("one", "two")]
    return base + weight * (own[0] - base) + 0.5 * (own[1] - base)


def test_a_configuration_is_shown_as_a_recipe_and_merged(configuration, tiny_pool, tmp_path):
    code, reported = call("merge", configuration(), "--out", tmp_path / "out")
    assert code == 0, reported
    assert "is mergekit's. As a recipe:" in reported
    assert "layers:1: 1.0" in reported
    merged = Checkpoint.open(str(tmp_path / "out"))
    for name in merged.tensors:
        if merged.tensors[name].dtype.is_floating_point:
            assert torch.allclose(merged.read(name).double(), expected(tiny_pool, name), atol=1e-7), name


def test_the_recipe_that_is_written_merges_to_the_same(configuration, tmp_path):
    path = configuration(dtype="bfloat16")
    code, reported = call("convert", path, "--out", tmp_path / "below" / "recipe.yaml")
    assert code == 0, reported
    recipe = load_recipe(str(tmp_path / "below" / "recipe.yaml"))
    assert recipe.base == load_recipe(str(path)).base
    assert not Path(yaml.safe_load((tmp_path / "below" / "recipe.yaml").read_text())["base"]).is_absolute()
    for file, out in ((path, "a"), (tmp_path / "below" / "recipe.yaml", "b")):
        assert call("merge", file, "--out", tmp_path / out)[0] == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["pooler.dense.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["dtype"] == "bfloat16"


def test_a_recipe_is_shown_where_no_file_is_named(configuration):
    code, reported = call("convert", configuration())
    assert code == 0
    assert "method: task_arithmetic" in reported


def test_models_of_the_hub_are_to_be_downloaded_and_nothing_is_replaced(configuration, tmp_path):
    code, reported = call("merge", configuration(base_model="org/llama"), "--out", tmp_path / "out")
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in " ".join(reported.split())
    path = configuration()
    assert call("convert", path, "--out", path)[0] == 2
    assert "merge_method" in path.read_text()
    assert call("convert", tmp_path / "nowhere.yaml")[0] == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: linear\n")
    code, reported = call("convert", recipe)
    assert code == 2
    assert "no mergekit configuration" in reported


def test_files_of_weights_have_a_size_in_parameters_or_bytes(configuration, tmp_path):
    path = configuration()
    for size, out in (("2k", "a"), ("8KB", "b")):
        assert call("merge", path, "--out", tmp_path / out, "--out-shard-size", size)[0] == 0
    files = [sorted(file.name for file in (tmp_path / out).glob("*.safetensors")) for out in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) > 5
    for bad in ("0", "5X", "-1B", "1.5B"):
        code, reported = call("merge", path, "--out", tmp_path / "c", f"--out-shard-size={bad}")
        assert code == 2, reported
        assert "is no size" in reported


def test_a_merge_without_a_tokenizer(configuration, tmp_path):
    path = configuration()
    for option, out in (("--no-copy-tokenizer", "a"), ("--copy-tokenizer", "b")):
        assert call("merge", path, "--out", tmp_path / out, option)[0] == 0
    own = [{file.name for file in (tmp_path / out).iterdir()} for out in "ab"]
    assert "tokenizer.json" in own[1]
    assert not any("token" in name or "vocab" in name for name in own[0])
    assert (own[1] - own[0]) >= {"tokenizer.json", "tokenizer_config.json"}
    assert "config.json" in own[0]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "model_stock"])
def test_a_merge_on_a_device_is_the_merge(configuration, tiny_pool, tmp_path, method):
    changes = {"merge_method": method, "parameters": {"t": 0.3, "density": 0.5, "weight": 0.5}}
    if method == "slerp":
        models = [{"model": str(tiny_pool[name])} for name in ("base", "one")]
    else:
        models = [{"model": str(tiny_pool[name])} for name in ("one", "two")]
    path = configuration(**changes, models=models)
    assert call("merge", path, "--out", tmp_path / "a", "--dtype", "float16")[0] == 0
    code, reported = call("merge", path, "--out", tmp_path / "b", "--dtype", "float16", "--device", "cpu")
    assert code == 0, reported
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.allclose(one[name].double(), two[name].double(), rtol=1e-3, atol=1e-6), name


def test_a_device_that_is_not_here_is_refused_before_anything_is_read(configuration, tmp_path):
    for device in ("cuda:63", "abacus", "hpu", "meta"):
        code, reported = call("merge", configuration(), "--out", tmp_path / "out", "--device", device)
        assert code == 2
        assert f"--device: '{device}' cannot be used here" in reported
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_another_model_is_a_member(tiny_pool, tmp_path):
    """The member is that model with scaling · B @ A added, whatever the recipe's base is."""
    base, other = Path(tiny_pool["base"]), tmp_path / "other"
    weights = load_file(base / "model.safetensors")
    other.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (other / file.name).write_bytes(file.read_bytes())
    moved = {name: value + 0.01 for name, value in weights.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    down, up = torch.randn(2, 32), torch.randn(32, 2) * 0.01
    key = "encoder.layer.0.attention.self.query"
    save_file(
        {f"base_model.model.{key}.lora_A.weight": down, f"base_model.model.{key}.lora_B.weight": up},
        adapter / "adapter_model.safetensors",
    )
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "base_model_name_or_path": "x",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    text = {
        "merge_method": "linear",
        "models": [{"model": f"{other}+adapter", "parameters": {"weight": 1.0}}],
        "base_model": str(base),
        "parameters": {"weight": 0.0},
    }
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(text))
    code, reported = call("merge", path, "--out", tmp_path / "out")
    assert code == 0, reported
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.allclose(merged[f"{key}.weight"], moved[f"{key}.weight"] + 2 * up @ down, atol=1e-6)
    assert torch.allclose(merged["pooler.dense.weight"], moved["pooler.dense.weight"])
    again = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert any(member.checkpoint.endswith("other+" + str(adapter)) for member in again.members.values())
    code, reported = call("merge", path, "--out", adapter)
    assert code == 2
    assert "would replace" in reported


def test_layers_one_after_another(tiny_pool, tmp_path):
    """Each layer is its source's, the embeddings the first slice's, and what comes after the layers the last's."""
    one, two = (str(tiny_pool[name]) for name in ("one", "two"))
    value = {
        "merge_method": "passthrough",
        "base_model": str(tiny_pool["base"]),
        "dtype": "float16",
        "slices": [
            {"sources": [{"model": one, "layer_range": [0, 2]}]},
            {"sources": [{"model": two, "layer_range": [1, 2]}]},
        ],
    }
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(value))
    code, reported = call("merge", path, "--out", tmp_path / "out")
    assert code == 0, reported
    assert "is mergekit's. As a recipe:" in reported
    merged = load_file(tmp_path / "out" / "model.safetensors")
    own = {name: load_file(Path(place) / "model.safetensors") for name, place in (("one", one), ("two", two))}
    key = "bert.encoder.layer.{}.output.dense.weight"
    sources = {
        "embeddings.word_embeddings.weight": own["one"]["bert.embeddings.word_embeddings.weight"],
        "encoder.layer.0.output.dense.weight": own["one"][key.format(0)],
        "encoder.layer.1.output.dense.weight": own["one"][key.format(1)],
        "encoder.layer.2.output.dense.weight": own["two"][key.format(1)],
        "pooler.dense.weight": own["two"]["bert.pooler.dense.weight"],
    }
    for name, value in sources.items():
        assert torch.equal(merged[name], value.half()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert call("convert", path, "--out", tmp_path / "below" / "slices.yaml")[0] == 0
    assert call("merge", tmp_path / "below" / "slices.yaml", "--out", tmp_path / "again")[0] == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(merged[name], again[name]) for name in merged)
