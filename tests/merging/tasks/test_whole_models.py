"""No kind of task runs a model with a weight that no checkpoint brought: it would be random, and so would the score."""

import json
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merging.errors import TaskError
from merging.tasks import (
    CausalLMSettings,
    CustomSettings,
    ImageClassificationSettings,
    Seq2SeqSettings,
    TextClassificationSettings,
    TokenClassificationSettings,
    ZeroShotSettings,
    make_task,
)

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
WORDS = {**SMALL, "vocab_size": 20, "max_position_embeddings": 16}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
T5 = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
TOWERS = {"text_config": WORDS, "vision_config": IMAGE, "projection_dim": 6}
DATA = {"data": {"validation": "nowhere.parquet"}}
KINDS = {
    "text_classification": ("BertForSequenceClassification", WORDS, "classifier.weight", TextClassificationSettings),
    "token_classification": ("BertForTokenClassification", WORDS, "classifier.bias", TokenClassificationSettings),
    "image_classification": ("ViTForImageClassification", IMAGE, "classifier.weight", ImageClassificationSettings),
    "causal_lm": ("LlamaForCausalLM", WORDS, "lm_head.weight", CausalLMSettings),
    "causal_lm inside": ("LlamaForCausalLM", WORDS, "model.norm.weight", CausalLMSettings),
    "seq2seq": ("T5ForConditionalGeneration", T5, "decoder.final_layer_norm.weight", Seq2SeqSettings),
    "zero shot": ("CLIPModel", TOWERS, "visual_projection.weight", partial(ZeroShotSettings, labels=["a", "b"])),
    "zero shot, text": ("CLIPModel", TOWERS, "text_projection.weight", partial(ZeroShotSettings, labels=["a", "b"])),
    "custom": ("BertForMaskedLM", WORDS, "cls.predictions.transform.dense.weight", CustomSettings),
}


@pytest.fixture
def make(tmp_path):
    """A kind's task, its head lacking a tensor: `make(kind, lacks=True)`."""

    def run(kind, lacks=True):
        name, settings, lost, task_settings = KINDS[kind]
        torch.manual_seed(0)
        model = getattr(transformers, name)
        whole = model(model.config_class(**settings))
        whole.save_pretrained(tmp_path / "head")
        if lacks:
            file = tmp_path / "head" / "model.safetensors"
            tensors = load_file(file)
            assert lost in tensors
            save_file({name: value for name, value in tensors.items() if name != lost}, file, {"format": "pt"})
        own = {"evaluator": "math:sqrt"} if kind == "custom" else DATA
        return make_task("x", task_settings(**own), str(tmp_path / "head")), lost

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_weight_is_an_error(make, kind):
    task, lost = make(kind)
    with pytest.raises(TaskError, match=rf"lacks .*{lost.split('.')[-2]}"):
        task.blank_model()
    with pytest.raises(TaskError, match=rf"lacks .*{lost.split('.')[-2]}"):
        task.load_model()
    with pytest.raises(TaskError, match="lacks"):
        task.load_skeleton(["none.weight"])


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq", "custom"])
def test_tied_weights_are_not_lost(make, kind, tmp_path):
    task, _ = make(kind, lacks=False)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    if kind == "causal_lm":
        (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        tensors = load_file(tmp_path / "head" / "model.safetensors")
        tensors.pop("lm_head.weight")
        save_file(tensors, tmp_path / "head" / "model.safetensors", {"format": "pt"})
    assert not task.blank_model()[1].missing
    model = task.load_model()
    head = model.get_output_embeddings().weight
    assert torch.equal(head, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("text_classification", "BertForSequenceClassification"),
        ("causal_lm", "LlamaForCausalLM"),
        ("seq2seq", "T5ForConditionalGeneration"),
        ("image_classification", "ViTForImageClassification"),
        ("zero shot", "CLIPModel"),
        ("custom", "BertForMaskedLM"),
    ],
)
def test_a_custom_task_loads_what_the_configuration_names(make, kind, expected, tmp_path):
    make(kind, lacks=False)
    task = make_task("own", CustomSettings(evaluator="math:sqrt"), str(tmp_path / "head"))
    assert type(task.load_model()).__name__ == expected
    assert type(task.blank_model()[0]).__name__ == expected
    if kind == "causal_lm":
        named = CustomSettings(evaluator="math:sqrt", model_class="AutoModel")
        assert type(make_task("own", named, str(tmp_path / "head")).load_model()).__name__ == "LlamaModel"
