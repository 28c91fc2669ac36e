"""A weight under two names is merged once where everybody ties it, and apart where anybody does not."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merging.checkpoints.checkpoint import SINGLE
from merging.checkpoints.pool import Pool
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.methods import METHODS
from merging.recipe import Recipe

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(3, 15)[None]


def qwen(seed=None, base=None, tie=True):
    """A tiny model, or one moved from it."""
    torch.manual_seed(seed or 0)
    if base is not None:
        model = copy.deepcopy(base)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn_like(value))
        return model
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Qwen2Config(
        vocab_size=40, num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=tie, **sizes
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def store(model, path, *, twice=False, head=None):
    model.save_pretrained(path)
    if twice or head is not None:
        values = load_file(path / SINGLE)
        save_file(values | {HEAD: values[EMBED].clone() if head is None else head}, path / SINGLE, {"format": "pt"})


def merged(tmp_path, method="average", **scaling):
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in ("a", "b")})
    recipe = METHODS[method].complete(Recipe(method, scaling or {"a": 1.0, "b": 1.0}))
    merge_to_disk(Material(pool), recipe, str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    return pool, load_file(tmp_path / "out" / SINGLE), model


@pytest.mark.parametrize("twice", ["base", "a", "ab", "base a", "base a b"])
def test_tied_and_stored_twice_is_one_weight(tmp_path, twice):
    base = qwen()
    members = {name: qwen(seed, base) for seed, name in enumerate("ab", 1)}
    for name, model in {"base": base, **members}.items():
        store(model, tmp_path / name, twice=name in twice)
    pool, written, model = merged(tmp_path)
    want = (members["a"].model.embed_tokens.weight + members["b"].model.embed_tokens.weight) / 2
    assert (EMBED in pool.weights, HEAD in pool.weights) == (True, False)
    assert HEAD not in written
    torch.testing.assert_close(model.model.embed_tokens.weight, want)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("method", ["dare", "della"])
def test_one_weight_gets_one_random_mask(tmp_path, method):
    base = qwen()
    for seed, name in enumerate(("base", "a", "b")):
        store(qwen(seed, base) if seed else base, tmp_path / name, twice=True)
    _, _, model = merged(tmp_path, method)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_untied_by_configuration_stays_two_weights(tmp_path):
    base = qwen(tie=False)
    members = {name: qwen(seed, base) for seed, name in enumerate("ab", 1)}
    for name, model in {"base": base, **members}.items():
        store(model, tmp_path / name)
    pool, _, model = merged(tmp_path)
    assert {EMBED, HEAD} <= set(pool.weights)
    torch.testing.assert_close(model.lm_head.weight, (members["a"].lm_head.weight + members["b"].lm_head.weight) / 2)


@pytest.mark.parametrize("how", ["differs", "configuration", "adapter"])
def test_one_member_apart_unties_all(tmp_path, how):
    base = qwen()
    members = {name: qwen(seed, base) for seed, name in enumerate("ab", 1)}
    for name, model in {"base": base, "b": members["b"]}.items():
        store(model, tmp_path / name, twice=name == "b")
    embed = members["a"].model.embed_tokens.weight.detach()
    head = embed + 0.01
    if how == "adapter":
        live = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        ).eval()
        with torch.no_grad():
            live.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.02)
        live.save_pretrained(tmp_path / "a")
        embed, head = base.model.embed_tokens.weight.detach(), base.lm_head.weight.detach() + 0.02
    else:
        store(members["a"], tmp_path / "a", head=head)
        if how == "configuration":
            file = tmp_path / "a" / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    pool, written, model = merged(tmp_path)
    other = members["b"].model.embed_tokens.weight
    torch.testing.assert_close(written[EMBED], (embed + other) / 2)
    torch.testing.assert_close(written[HEAD], (head + other) / 2)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model.lm_head.weight, written[HEAD])
    assert any("does not tie them" in note for note in pool.notes)


def test_what_untied_embeddings_untie_besides(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes)).eval()
    with torch.no_grad():
        base.cls.predictions.bias.add_(torch.randn(40))
    decoder = base.bert.embeddings.word_embeddings.weight + 0.1
    for name in ("base", "a", "b"):
        base.save_pretrained(tmp_path / name)
    values = load_file(tmp_path / "a" / SINGLE)
    save_file(values | {"cls.predictions.decoder.weight": decoder}, tmp_path / "a" / SINGLE, {"format": "pt"})
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in ("a", "b")})
    merge_to_disk(Material(pool), Recipe("average", {"a": 1.0, "b": 1.0}), str(tmp_path / "out"))
    model, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(model.cls.predictions.decoder.weight, decoder - 0.05)
    torch.testing.assert_close(model.cls.predictions.decoder.bias, base.cls.predictions.bias)


def test_a_tied_t5_of_which_one_member_has_a_head_apart(tmp_path):
    """Its configuration cannot untie it without changing what it computes: two unequal tensors do."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    base = transformers.T5ForConditionalGeneration(config).eval()
    for name in ("base", "a", "b"):
        base.save_pretrained(tmp_path / name)
    values = load_file(tmp_path / "a" / SINGLE)
    head = values["shared.weight"] + 0.5
    save_file(values | {HEAD: head}, tmp_path / "a" / SINGLE, {"format": "pt"})
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in ("a", "b")})
    merge_to_disk(Material(pool), Recipe("average", {"a": 1.0, "b": 1.0}), str(tmp_path / "out"))
    result = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(result.lm_head.weight, base.shared.weight + 0.25)
    torch.testing.assert_close(result.shared.weight, base.shared.weight)
    want = copy.deepcopy(base)
    want.lm_head.weight = torch.nn.Parameter(base.shared.weight + 0.25)
    with torch.no_grad():
        torch.testing.assert_close(
            result(input_ids=IDS, decoder_input_ids=IDS).logits, want(input_ids=IDS, decoder_input_ids=IDS).logits
        )


@pytest.mark.parametrize("twice", [False, True])
def test_a_base_without_the_backbones_prefix(tmp_path, twice):
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=40)
    )
    for seed, name in enumerate(("base", "a", "b")):
        (qwen(seed, base) if seed else base).save_pretrained(tmp_path / name)
        values = load_file(tmp_path / name / SINGLE)
        if name == "base":
            values = {key.removeprefix("transformer."): value for key, value in values.items()}
        elif twice:
            values |= {HEAD: values["transformer.wte.weight"].clone()}
        save_file(values, tmp_path / name / SINGLE, {"format": "pt"})
    _, written, model = merged(tmp_path)
    a, b = (load_file(tmp_path / name / SINGLE)["transformer.wte.weight"] for name in "ab")
    assert HEAD not in written
    torch.testing.assert_close(written["wte.weight"], (a + b) / 2)
    torch.testing.assert_close(model.lm_head.weight, (a + b) / 2)
