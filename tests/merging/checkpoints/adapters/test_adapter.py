import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from merging.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterCheckpoint, open_checkpoint
from merging.checkpoints.checkpoint import SINGLE, Checkpoint
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import check_weights
from merging.errors import CheckpointError, PoolError
from merging.evaluation.live_models import LiveModels
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material, head_tensors
from merging.recipe import Recipe, member_recipe
from merging.statistics import STATISTICS, StatisticSettings, measure
from merging.tasks import TextClassificationSettings, make_task
from merging.tasks.head import load_model

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def adapt(base, loader, path, dtype=torch.float32, labels=None, **settings):
    """Saves a random adapter in `path`, and what peft merges it to in `path`-merged, whose directory it returns."""
    torch.manual_seed(5)
    model = loader.from_pretrained(base, dtype=dtype, **({"num_labels": labels} if labels else {}))
    adapted = get_peft_model(model, LoraConfig(**({"r": 2, "init_lora_weights": False} | settings)))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
            assert "lora_" not in name or value.abs().max() > 0
    adapted.save_pretrained(path)
    adapted.merge_and_unload().save_pretrained(f"{path}-merged")
    return f"{path}-merged"


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tiny_pool):
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, tie_word_embeddings=False, **SIZE)),
        "vit": ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZE)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models} | {"bert": tiny_pool["base"]}


CASES = {
    "classifier": (
        "bert",
        AutoModelForSequenceClassification,
        {"task_type": "SEQ_CLS", "target_modules": ["query"]},
        3,
    ),
    "patterns": (
        "bert",
        AutoModelForSequenceClassification,
        {
            "task_type": "SEQ_CLS",
            "target_modules": ["query", "value", "word_embeddings", "intermediate.dense"],
            "use_rslora": True,
            "rank_pattern": {"layer.1.attention.self.value": 3},
            "alpha_pattern": {"query": 5, "^bert.encoder.layer.0.intermediate.dense": 7},
            "bias": "lora_only",
        },
        4,
    ),
    "conv1d": (
        "gpt2",
        AutoModelForSequenceClassification,
        {"task_type": "SEQ_CLS", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        5,
    ),
    "decoder": (
        "llama",
        AutoModelForCausalLM,
        {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        None,
    ),
    "vision": (
        "vit",
        AutoModelForImageClassification,
        {"target_modules": r".*(q_proj|query|projection)", "modules_to_save": ["classifier"]},
        3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_peft_merges(bases, tmp_path, name):
    base, loader, settings, labels = CASES[name]
    merged = load_file(f"{adapt(bases[base], loader, str(tmp_path / 'a'), labels=labels, **settings)}/{SINGLE}")
    opened = open_checkpoint(str(tmp_path / "a"), str(bases[base]))
    assert isinstance(opened, AdapterCheckpoint)
    assert set(opened.tensors) == set(merged)
    assert opened.adapted.low_rank
    assert labels in (None, len(opened.config.get("id2label", ())))
    for key, value in merged.items():
        result = opened.read(key)
        assert (result.dtype, tuple(result.shape)) == (opened.tensors[key].dtype, opened.tensors[key].shape)
        torch.testing.assert_close(result, value, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_rounded_once(bases, tmp_path):
    LlamaForCausalLM.from_pretrained(bases["llama"]).bfloat16().save_pretrained(tmp_path / "base")
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    merged = adapt(tmp_path / "base", AutoModelForCausalLM, str(tmp_path / "a"), torch.bfloat16, **settings)
    path = tmp_path / "a" / ADAPTER_WEIGHTS
    exact = {key: value.float() for key, value in load_file(path).items()}
    wide = open_checkpoint(str(tmp_path / "a"), str(tmp_path / "base"))
    assert {wide.read(name).dtype for name in wide.adapted.low_rank} == {torch.float32}, (
        "the task vector is not rounded away"
    )
    save_file({key: value.bfloat16() for key, value in exact.items()}, path)
    opened = open_checkpoint(str(tmp_path / "a"), str(tmp_path / "base"))
    theirs, base = load_file(f"{merged}/{SINGLE}"), load_file(tmp_path / "base" / SINGLE)
    for name in opened.adapted.low_rank:
        down, up = (load_file(path)[getattr(opened.adapted.low_rank[name], part)].double() for part in ("down", "up"))
        expected = base[name].double() + 4.0 * up @ down
        assert opened.read(name).dtype == torch.bfloat16
        assert ((opened.read(name).double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
        torch.testing.assert_close(theirs[name].double(), expected, rtol=2**-6, atol=2**-6)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, tiny_pool, write_texts):
    """The tiny pool with an adapter `lora` as a member, the same member merged by peft, and a task for both."""
    root = tmp_path_factory.mktemp("mixed")
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "lora_alpha": 0.1}
    merged = adapt(tiny_pool["base"], AutoModelForSequenceClassification, str(root / "lora"), labels=3, **settings)
    for file in tiny_pool["base"].glob("*token*"):
        shutil.copy(file, merged)
    data = {split: str(write_texts(root / f"{split}.parquet", 20, 3)) for split in ("train", "validation")}
    return {"lora": str(root / "lora"), "merged": merged, "task": TextClassificationSettings(data=data, max_length=16)}


def test_an_adapter_is_a_member_like_any_other(tiny_pool, mixed, tmp_path):
    base = str(tiny_pool["base"])
    pools = {kind: Pool.open(base, {"two": str(tiny_pool["two"]), "x": mixed[kind]}) for kind in ("lora", "merged")}
    assert set(pools["lora"].weights) == set(pools["merged"].weights)
    assert set(pools["lora"].members["x"].head) == {"classifier.bias", "classifier.weight"}
    for name, value in head_tensors(pools["lora"], "x").items():
        torch.testing.assert_close(value, head_tensors(pools["merged"], "x")[name])
    assert 0 < check_weights(pools["lora"])["x"] < 0.9
    written, scores, grams = {}, {}, {}
    for kind, pool in pools.items():
        recipe = Recipe("average", {"two": 1.0, "x": 1.0})
        merge_to_disk(Material(pool), recipe, str(tmp_path / kind))
        written[kind] = Checkpoint.open(str(tmp_path / kind))
        task = make_task("x", mixed["task"], mixed[kind], base)
        assert any("has no test split" in note for note in task.check())
        live = LiveModels(Material(pool), [task], {"x": "x"}, torch.device("cpu"))
        scores[kind] = [live.measure(r, "validation").scores["x"].loss for r in (member_recipe("x"), recipe)]
        statistic = STATISTICS["gram"](StatisticSettings(examples=8))
        grams[kind] = statistic.finalize(measure(task, statistic))
    assert scores["lora"] == pytest.approx(scores["merged"], rel=1e-5)
    assert grams["lora"].keys() == grams["merged"].keys()
    assert set(grams["lora"]) <= set(pools["lora"].members["x"].checkpoint.tensors)
    for name in pools["lora"].weights:
        torch.testing.assert_close(written["lora"].read(name), written["merged"].read(name), rtol=1e-5, atol=1e-6)


def test_adapters_are_opened_together_by_a_process_that_has_not_imported_transformers(tiny_pool, mixed):
    opening = f"""
from merging.checkpoints.pool import Pool
pool = Pool.open({str(tiny_pool["base"])!r}, {{f"m{{i}}": {mixed["lora"]!r} for i in range(8)}})
print(len(pool.members))
"""
    done = subprocess.run([sys.executable, "-c", opening], capture_output=True, text=True, check=False)
    assert done.stdout == "8\n", done.stderr


def test_the_fingerprint_follows_base_and_adapter(tiny_pool, mixed, tmp_path, save_base):
    def fingerprint(base):
        return open_checkpoint(str(tmp_path / "a"), base).fingerprint

    shutil.copytree(mixed["lora"], tmp_path / "a")
    base = str(tiny_pool["base"])
    first = fingerprint(base)
    assert fingerprint(base) == first
    assert fingerprint(str(save_base(tmp_path / "other", seed=3))) != first
    settings = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    (tmp_path / "a" / ADAPTER_CONFIG).write_text(json.dumps(settings | {"lora_alpha": 9}))
    assert fingerprint(base) != first


def test_the_base_may_be_the_one_that_the_adapter_names(mixed, tiny_pool, tmp_path):
    assert open_checkpoint(mixed["lora"]).base.path == str(tiny_pool["base"])
    path = shutil.copytree(mixed["lora"], tmp_path / "a")
    settings = json.loads((path / ADAPTER_CONFIG).read_text())
    (path / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "someone/model"}))
    with pytest.raises(CheckpointError, match="adapter of 'someone/model', which is no directory"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter, and only LoRA"),
        ({"use_dora": True}, "use_dora = True.*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
        ({"bias": "all"}, "bias = 'all', but holds no bias"),
        ({"task_type": "CAUSAL_LM"}, "holds 'base_model.model.bert.+', of which BertLMHeadModel knows nothing"),
    ],
)
def test_what_is_no_plain_lora_is_refused(mixed, tiny_pool, tmp_path, changes, message):
    path = shutil.copytree(mixed["lora"], tmp_path / "a")
    settings = json.loads((path / ADAPTER_CONFIG).read_text())
    (path / ADAPTER_CONFIG).write_text(json.dumps(settings | changes))
    if changes.get("bias"):
        values = load_file(path / ADAPTER_WEIGHTS)
        save_file({k: v for k, v in values.items() if not k.endswith("bias")}, path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        Pool.open(str(tiny_pool["base"]), {"a": str(path)})


def test_damaged_adapters_are_refused(mixed, tiny_pool, tmp_path):
    path = shutil.copytree(mixed["lora"], tmp_path / "a")
    values = load_file(path / ADAPTER_WEIGHTS)
    half = next(key for key in values if "lora_A" in key)

    def opened(changed):
        save_file(changed, path / ADAPTER_WEIGHTS)
        return Pool.open(str(tiny_pool["base"]), {"a": str(path)})

    with pytest.raises(CheckpointError, match="only one of the two factors"):
        opened({key: value for key, value in values.items() if key != half})
    with pytest.raises(CheckpointError, match="it belongs to another base"):
        opened(values | {half: values[half][:, :-1].contiguous()})
    with pytest.raises(PoolError, match="NaN or Inf"):
        check_weights(opened(values | {half: values[half] * float("nan")}))
    (path / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        Pool.open(str(tiny_pool["base"]), {"a": str(path)})


def tiny(kind, **changes):
    """A tiny model whose weights are large enough for its logits to differ clearly."""
    sizes = SIZE | {"vocab_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.2}
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | changes)).eval()


def trained(model, path, **settings):
    """Saves an adapter of a model after its weights moved; returns the live model."""
    torch.manual_seed(3)
    live = get_peft_model(copy.deepcopy(model), LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | settings))).eval()
    with torch.no_grad():
        for value in live.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    live.save_pretrained(path)
    return live


TIED = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
}
IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_embeddings_and_head_are_the_live_models(tmp_path, name, tie):
    base = tiny("Qwen2", tie_word_embeddings=tie)
    base.save_pretrained(tmp_path / "base")
    live = trained(base, tmp_path / "a", **TIED[name])
    result = load_model(str(tmp_path / "a"), "AutoModelForCausalLM", base=str(tmp_path / "base"))
    with torch.no_grad():
        torch.testing.assert_close(result(IDS).logits, live(IDS).logits, rtol=1e-5, atol=1e-5)
        assert (live(IDS).logits - base(IDS).logits).abs().max() > 0.1
    opened = open_checkpoint(str(tmp_path / "a"), str(tmp_path / "base"))
    assert ("lm_head.weight" in opened.tensors) == (not tie or name != "neither")
    assert opened.config["tie_word_embeddings"] is (tie and name == "neither")


@pytest.mark.parametrize("equal", [True, False])
def test_a_base_that_stores_the_tied_weight_twice(tmp_path, equal):
    """With different values, transformers ties nothing."""
    base = tiny("Qwen2", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    values = load_file(tmp_path / "base" / SINGLE)
    head = values["model.embed_tokens.weight"] + (0.0 if equal else 0.5)
    save_file(values | {"lm_head.weight": head}, tmp_path / "base" / SINGLE, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    live = trained(loaded, tmp_path / "a", target_modules=["q_proj"])
    pool = Pool.open(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    merge_to_disk(Material(pool), Recipe("linear", {"a": 1.0}), str(tmp_path / "out"))
    assert ("lm_head.weight" in load_file(tmp_path / "out" / SINGLE)) is not equal
    with torch.no_grad():
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(result(IDS).logits, live(IDS).logits, rtol=1e-5, atol=1e-5)


def test_names_of_an_older_transformers(tmp_path):
    sizes = SIZE | {"vocab_size": 40, "num_key_value_heads": 1, "initializer_range": 0.2}
    torch.manual_seed(0)
    base = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config={"model_type": "llama", **sizes},
            vision_config={
                "model_type": "clip_vision_model",
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": 16,
                **SIZE,
            },
            image_token_index=39,
        )
    ).eval()
    base.save_pretrained(tmp_path / "base")
    live = trained(base, tmp_path / "a", target_modules=r".*language_model.*q_proj")
    values = load_file(tmp_path / "a" / ADAPTER_WEIGHTS)
    older = {
        key.replace("model.model.language_model.", "model.language_model.model."): value
        for key, value in values.items()
    }
    assert older.keys() != values.keys()
    save_file(older, tmp_path / "a" / ADAPTER_WEIGHTS)
    pool = Pool.open(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    merge_to_disk(Material(pool), Recipe("linear", {"a": 1.0}), str(tmp_path / "out"))
    with torch.no_grad():
        result = type(base).from_pretrained(tmp_path / "out")
        torch.testing.assert_close(result(input_ids=IDS).logits, live(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
        assert (live(input_ids=IDS).logits - base(input_ids=IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tie", [True, False])
def test_saved_embeddings_of_a_grown_vocabulary(tmp_path, tie, targets):
    base = tiny("Llama", tie_word_embeddings=tie)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(42)
    live = trained(base, tmp_path / "a", target_modules=targets)
    live.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    result = load_model(str(tmp_path / "a"), "AutoModelForCausalLM", base=str(tmp_path / "base"))
    with torch.no_grad():
        torch.testing.assert_close(result(IDS).logits, live(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}),
    ],
)
def test_attention_of_a_mixture_of_experts(tmp_path, kind, changes):
    base = tiny(kind, tie_word_embeddings=False, **changes)
    base.save_pretrained(tmp_path / "base")
    live = trained(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    pool = Pool.open(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    merge_to_disk(Material(pool), Recipe("linear", {"a": 1.0}), str(tmp_path / "out"))
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(result(IDS).logits, live(IDS).logits, rtol=1e-5, atol=1e-5)
        assert (live(IDS).logits - base(IDS).logits).abs().max() > 0.05


def test_a_vision_language_model(tmp_path):
    text = {"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, **SIZE}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    torch.manual_seed(0)
    base = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        )
    ).eval()
    base.save_pretrained(tmp_path / "base")
    live = trained(base, tmp_path / "a", target_modules=r".*language_model.*\.(q_proj|v_proj)")
    pool = Pool.open(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    merge_to_disk(Material(pool), Recipe("linear", {"a": 1.0}), str(tmp_path / "out"))
    result = type(base).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(result(input_ids=IDS).logits, live(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


OTHERS = {
    "an output bias that is tied, too": ("Bert", "ForMaskedLM", {"target_modules": ["query", "decoder"]}),
    "biases beside a saved head": (
        "Bert",
        "ForSequenceClassification",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "running statistics": (
        "ResNet",
        "ForImageClassification",
        {"target_modules": ["convolution"], "modules_to_save": ["normalization"]},
    ),
    "two towers": ("CLIP", "Model", {"target_modules": ["q_proj", "text_projection"]}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_is_what_the_live_model_computes(tmp_path, name):
    kind, suffix, settings = OTHERS[name]
    text = SIZE | {"vocab_size": 40, "max_position_embeddings": 32}
    sizes = {
        "Bert": text,
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
        "CLIP": {
            "text_config": text,
            "vision_config": SIZE | {"image_size": 8, "patch_size": 4},
            "projection_dim": 8,
        },
    }
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}{suffix}")(getattr(transformers, f"{kind}Config")(**sizes[kind])).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if kind != "Bert" else {}
    inputs |= {"input_ids": IDS} if kind != "ResNet" else {}
    with torch.no_grad():
        for value in base.parameters():
            value.add_(0.2 * torch.randn_like(value))
    base.save_pretrained(tmp_path / "base")
    live = trained(base, tmp_path / "a", **settings, task_type=None)
    if kind == "ResNet":
        for value in dict(live.named_buffers()).values():
            value.add_(1)
        live.save_pretrained(tmp_path / "a")
    pool = Pool.open(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    merge_to_disk(Material(pool), Recipe("linear", {"a": 1.0}), str(tmp_path / "out"))
    result, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        one, other, before = (model(**inputs) for model in (result.eval(), live, base))
    get = "logits_per_image" if kind == "CLIP" else "logits"
    torch.testing.assert_close(one[get], other[get], rtol=1e-5, atol=1e-5)
    assert (other[get] - before[get]).abs().max() > 0.05


def test_experts_that_are_saved_in_full_are_refused(tmp_path):
    base = tiny("Mixtral", num_local_experts=2, tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(CheckpointError, match=r"gate_up_proj', whose parts are weights of their own"):
        open_checkpoint(str(tmp_path / "a"), str(tmp_path / "base"))


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 0},
        {"r": -2},
        {"r": "two"},
        {"r": 3},
        {"lora_alpha": -1},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(q_proj": 2}},
        {"alpha_pattern": {"q_proj": "four"}},
        {"alpha_pattern": ["q_proj"]},
        {"ensure_weight_tying": True, "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_configurations_that_peft_could_not_have_trained_with(tmp_path, changed):
    base = tiny("Qwen2", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = tmp_path / "a" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(CheckpointError, match=rf"{next(iter(changed))}|has rank 2"):
        open_checkpoint(str(tmp_path / "a"), str(tmp_path / "base"))
