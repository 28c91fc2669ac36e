"""Models without weights answer what transformers' own models would."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merging.checkpoints.checkpoint import SINGLE
from merging.checkpoints.models import skeleton

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "config", "table"),
    [
        ("LlamaForCausalLM", transformers.LlamaConfig(vocab_size=40, **TEXT), "model.embed_tokens"),
        (
            "BertForTokenClassification",
            transformers.BertConfig(vocab_size=40, **TEXT),
            "bert.embeddings.word_embeddings",
        ),
        (
            "T5ForConditionalGeneration",
            transformers.T5Config(vocab_size=40, d_model=16, num_layers=1, num_heads=2),
            "shared",
        ),
        ("ViTForImageClassification", transformers.ViTConfig(image_size=8, patch_size=4, **TEXT), None),
        ("ResNetForImageClassification", transformers.ResNetConfig(hidden_sizes=[8], depths=[1]), None),
        ("CanineForSequenceClassification", transformers.CanineConfig(**TEXT), None),
    ],
)
def test_the_table_of_tokens(kind, config, table):
    """One of patches, of pixels, or of characters by hash is none."""
    model = skeleton.build("somewhere", config.to_dict(), kind)
    result = skeleton.token_table(model)
    assert result is (model.get_submodule(table) if table else None)
    assert result is None or result.weight.is_meta


@pytest.mark.parametrize("prefix", ["", "model.", "other."])
def test_names_are_those_that_transformers_loads(tmp_path, prefix):
    """Without the backbone's prefix, with it, and with one that the model does not know."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **TEXT))
    model.save_pretrained(tmp_path)
    values = {
        prefix + name.removeprefix("model."): torch.full_like(value, 0.5)
        for name, value in load_file(tmp_path / SINGLE).items()
    }
    save_file(values, tmp_path / SINGLE, {"format": "pt"})
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    live = skeleton.live_names(skeleton.build("somewhere", model.config.to_dict(), "LlamaForCausalLM"), values)
    assert set(live.values()) == {name for name, value in loaded.named_parameters() if (value == 0.5).all()}
    assert list(live) == [name for name in values if name in live], "in the order of the names"
