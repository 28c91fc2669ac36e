"""Tensors that are no parameters: tables are left alone, running statistics averaged."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merging.checkpoints.checkpoint import SINGLE
from merging.checkpoints.pool import Pool
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.recipe import Recipe

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
NEEDS = {name: METHODS[name].needs(METHODS[name].defaults()).members for name in METHODS}
DATA_FREE = [name for name in METHODS if not NEEDS[name] and METHODS[name].solution is None]


def moved(model, seed):
    torch.manual_seed(seed)
    new = copy.deepcopy(model)
    with torch.no_grad():
        for value in new.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return new


def build(tmp_path, base, extra, who):
    models = {"base": base, "a": moved(base, 1), "b": moved(base, 2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        if name in who:
            save_file(load_file(tmp_path / name / SINGLE) | extra, tmp_path / name / SINGLE, {"format": "pt"})
    return Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in "ab"}), models


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    )


def tables(dtype):
    mask = torch.tril(torch.ones(1, 1, 8, 8)).to(dtype)
    return {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
@pytest.mark.parametrize("who", [["base"], ["a"], ["base", "a"], ["base", "a", "b"]])
def test_masks_that_older_versions_saved_change_nothing(tmp_path, who, dtype):
    pool, models = build(tmp_path, gpt2(), tables(dtype), who)
    merge_to_disk(Material(pool), METHODS["dare"].default_recipe(["a", "b"]), str(tmp_path / "dare"))
    merge_to_disk(Material(pool), Recipe("average", {"a": 1.0, "b": 1.0}), str(tmp_path / "out"))
    for out in ("dare", "out"):
        written = load_file(tmp_path / out / SINGLE)
        assert set(written) == set(load_file(tmp_path / "base" / SINGLE))
        for name, value in tables(dtype).items():
            assert "base" not in who or torch.equal(written[name], value)
    for name, value in models["a"].state_dict().items():
        if name in pool.weights:
            torch.testing.assert_close(written[name], (value + models["b"].state_dict()[name]) / 2)
    assert any("masked_bias" in note for note in pool.notes) == ("base" not in who)


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZE))


ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq", torch.tensor([1.0, 0.1, 0.01, 0.001])
POSITIONS = "embeddings.position_ids", torch.arange(8)[None]


@pytest.mark.parametrize("who", [["a"], ["base", "b"]])
@pytest.mark.parametrize(("make", "table"), [(llama, ROTARY), (bert, POSITIONS)])
def test_tables_of_rotary_and_of_positions(tmp_path, make, table, who):
    name, value = table
    pool, models = build(tmp_path, make(), {name: value}, who)
    trained = dict(models["base"].named_parameters())
    assert set(pool.weights) == set(trained)
    for member in pool.members.values():
        assert set(member.names.values()) == set(trained)
        assert name not in member.head
    assert any(name in note for note in pool.notes) == ("base" not in who)
    merge_to_disk(Material(pool), Recipe("average", {"a": 1.0, "b": 1.0}), str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / SINGLE)
    assert set(written) == set(trained) | ({name} if "base" in who else set())
    assert name not in written or torch.equal(written[name], value)
    for key in trained:
        one, other = (models[member].get_parameter(key) for member in "ab")
        torch.testing.assert_close(written[key], (one + other) / 2)


@pytest.fixture(scope="module")
def resnets(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnets")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    base = transformers.ResNetForImageClassification(config)
    for seed, name in enumerate(("base", "a", "b")):
        model = moved(base, seed)
        for key, value in model.named_buffers():
            if key.endswith("running_var"):
                value.copy_(torch.rand_like(value) * (0.01 if name != "base" else 1.0))
        model.save_pretrained(path / name)
    return path


@pytest.mark.parametrize("name", DATA_FREE)
def test_running_statistics_are_averaged_by_every_method(resnets, tmp_path, name):
    pool = Pool.open(str(resnets / "base"), {member: str(resnets / member) for member in "ab"})
    members = ("a", "b")[: METHODS[name].most_members]
    factors = dict(zip(members, (0.6, 0.3), strict=False))
    recipe = METHODS[name].complete(Recipe(name, factors))
    merge_to_disk(Material(pool), recipe, str(tmp_path / "out"), max_bytes=10_000)
    written = load_file(tmp_path / "out" / SINGLE)
    out = {key: torch.empty(info.shape) for key, info in pool.weights.items()}
    ResidentMerger(Material(pool), out).merge(recipe)
    values = {member: load_file(resnets / member / SINGLE) for member in members}
    running = [key for key in written if "running_" in key]
    assert running
    for key in running:
        want = sum(values[m][key].double() * f for m, f in factors.items()) / sum(factors.values())
        torch.testing.assert_close(written[key].double(), want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out[key].double(), want, rtol=1e-6, atol=1e-7)
    counts = [key for key in written if key.endswith("num_batches_tracked")]
    base = load_file(resnets / "base" / SINGLE)
    assert all(torch.equal(written[key], base[key]) for key in counts)


def test_without_a_positive_factor_the_bases_statistics_stay(resnets, tmp_path):
    pool = Pool.open(str(resnets / "base"), {"a": str(resnets / "a")})
    merge_to_disk(
        Material(pool),
        METHODS["task_arithmetic"].complete(Recipe("task_arithmetic", {"a": -1.0})),
        str(tmp_path / "out"),
    )
    written, base = load_file(tmp_path / "out" / SINGLE), load_file(resnets / "base" / SINGLE)
    assert all(torch.equal(written[key], base[key]) for key in written if "running_" in key)


@pytest.mark.parametrize("who", [["base"], ["a"], ["base", "b"]])
def test_what_some_versions_save_of_encoder_decoders(tmp_path, who):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    base = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=40, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    )
    extra = {"model.encoder.version": torch.tensor([3.0]), "model.decoder.version": torch.tensor([3.0])}
    models = {"base": base, "a": moved(base, 1), "b": moved(base, 2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        values = load_file(tmp_path / name / SINGLE)
        if name in who:
            del values["final_logits_bias"]
            save_file(values | extra, tmp_path / name / SINGLE, {"format": "pt"})
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in "ab"})
    merge_to_disk(Material(pool), Recipe("average", {"a": 1.0, "b": 1.0}), str(tmp_path / "out"))
    merged = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, value in merged.named_parameters():
        one, other = (models[who].get_parameter(name) for who in "ab")
        torch.testing.assert_close(value, (one + other) / 2)
