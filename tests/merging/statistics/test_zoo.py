"""Statistics of many architectures against brute force: every example alone and unpadded, plain autograd, plain hooks."""

from collections.abc import Callable

import pytest
import torch
import transformers

from merging.statistics import (
    Fisher,
    Gram,
    LikelihoodSettings,
    OutputGram,
    OutputGramSettings,
    StatisticSettings,
    measure,
)
from merging.testing.reference import brute_force

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 20}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
RELATIVE = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ZOO: dict[str, tuple[str, dict[str, object]]] = {
    "Llama": ("", {**SIZE, **TEXT, **GROUPED}),
    "Qwen2": ("", {**SIZE, **TEXT, **GROUPED}),
    "GPT2": ("", {**TEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}),
    "T5": (
        "",
        {
            **TEXT,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "relative_attention_num_buckets": 8,
        },
    ),
    "ViT": ("Image", {**SIZE, **IMAGE}),
    "CLIP": ("Image", {"vision_config": {**SIZE, **IMAGE}, "num_labels": 3}),
    "DistilBert": ("", {**TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "Albert": ("", {**SIZE, **TEXT, "embedding_size": 8}),
    "Electra": ("", {**SIZE, **TEXT, "embedding_size": 8}),
    "MPNet": ("", {**SIZE, **TEXT}),
    "ModernBert": ("", {**SIZE, **TEXT, "global_attn_every_n_layers": 2, "local_attention": 4}),
    "DebertaV2": ("", {**SIZE, **TEXT, **RELATIVE}),
}
MORE: dict[str, tuple[str, dict[str, object]]] = {
    "Bert": ("", {**SIZE, **TEXT}),
    "Roberta": ("", {**SIZE, **TEXT}),
    "Deberta": (
        "",
        {
            **SIZE,
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 6,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "Mixtral": ("", {**SIZE, **TEXT, **GROUPED, **EXPERTS}),
    "Bart": (
        "",
        {
            **TEXT,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
            "bos_token_id": 2,
        },
    ),
    "XLNet": (
        "",
        {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "MobileBert": ("", {**SIZE, **TEXT, "embedding_size": 8, "true_hidden_size": 16, "intra_bottleneck_size": 16}),
    "Longformer": ("", {**SIZE, **TEXT, "attention_window": [4, 4], "max_position_embeddings": 32}),
    "SqueezeBert": ("", {**SIZE, **TEXT, "embedding_size": 16, "q_groups": 1, "k_groups": 1, "v_groups": 1}),
    "Gemma2": ("", {**SIZE, **TEXT, **GROUPED, "query_pre_attn_scalar": 8}),
    "GPTNeoX": ("", {**SIZE, **TEXT}),
    "Phi": ("", {**SIZE, **TEXT}),
    "XLMRobertaXL": ("", {**SIZE, **TEXT}),
    "Dinov2": ("Image", {**{k: v for k, v in SIZE.items() if k != "intermediate_size"}, **IMAGE}),
    "Swin": (
        "Image",
        {
            "image_size": 8,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "num_labels": 3,
        },
    ),
    "Beit": ("Image", {**SIZE, **IMAGE, "use_relative_position_bias": True}),
}
CASES = [*ZOO, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
COUNT = 4


@pytest.fixture
def zoo(build: Callable[..., object], tiny_task: type) -> Callable[[str], object]:
    """Name of an architecture → its classifier, float64 and far from its initialisation, with four unlike examples."""

    def make(name: str) -> object:
        modality, settings = {**ZOO, **MORE}[name]
        head = "ForImageClassification" if modality else "ForSequenceClassification"
        torch.manual_seed(0)
        model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**settings))
        generator = torch.Generator().manual_seed(1)
        # grouped products of experts know no float64
        model = model.to(torch.float32 if "num_local_experts" in settings else torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter += (0.2 if parameter.dim() > 1 else 0.1) * noise
        labels = torch.arange(COUNT) % 3
        if modality:
            images = torch.randn(COUNT, 3, 8, 8, generator=generator, dtype=torch.float64)
            return tiny_task(model, {"pixel_values": images}, labels)
        mask = (torch.arange(9) < torch.tensor([9, 4, 6, 4])[:, None]).long()
        ids = torch.randint(4, 40, (COUNT, 9), generator=generator) * mask
        if settings.get("eos_token_id") == 1:
            ids[torch.arange(COUNT), mask.sum(1) - 1] = 1
        return tiny_task(model, {"input_ids": ids, "attention_mask": mask}, labels, mask)

    return make


def assert_near(result, expected, tolerance=2e-5):
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-9 * largest)
        assert float((result[name].double() - value.double()).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("name", CASES)
def test_every_statistic_is_its_definition(zoo, name):
    task = zoo(name)
    sums = brute_force(task)
    fisher, grams, outputs, rows = sums.fisher, sums.gram, sums.output_gram, sums.rows
    for size in (3, 4):
        result = measure(task, Fisher(LikelihoodSettings(batch_size=size)))
        assert result.sums.keys() == fisher.keys()
        assert_near(result.sums, fisher)
        result = measure(task, Gram(StatisticSettings(batch_size=size)))
        # what joined experts have is compared in test_experts.py
        assert {name for name in {*result.sums, *result.shared} if "experts" not in name} == {*grams}
        assert_near({weight: result.sums[result.shared.get(weight, weight)] for weight in grams}, grams)
        assert {weight: result.counts[result.shared.get(weight, weight)] for weight in grams} == rows
        result = measure(task, OutputGram(OutputGramSettings(batch_size=size)))
        assert not any(value.any() for weight, value in outputs.items() if weight not in result.sums)
        assert_near(result.sums, {weight: outputs[weight] for weight in result.sums})
        assert all(result.counts[weight] == rows[weight] for weight in result.sums)
