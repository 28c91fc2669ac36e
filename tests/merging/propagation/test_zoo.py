"""RegMean propagated over many architectures: what a batch holds beside its examples changes nothing."""

import pytest
import torch
import transformers

from merging.checkpoints.pool import Pool
from merging.propagation import PropagationSettings, propagate

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 20}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
RELATIVE = {"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1, "position_biased_input": False,
            "type_vocab_size": 0}  # fmt: skip
ZOO = {
    "DebertaV2": {**SIZE, **TEXT, **RELATIVE, "share_att_key": True},
    "Qwen2": {**SIZE, **TEXT, **GROUPED},
    "Mixtral": {**SIZE, **TEXT, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}
MORE = {
    "DebertaV2 apart": {**SIZE, **TEXT, **RELATIVE, "share_att_key": False},
    "Deberta": {
        **SIZE,
        **TEXT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 6,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "CLIP": {"vision_config": {**SIZE, **IMAGE}, "num_labels": 3},
    "DistilBert": {**TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "Electra": {**SIZE, **TEXT, "embedding_size": 8},
    "MPNet": {**SIZE, **TEXT},
    "ModernBert": {**SIZE, **TEXT, "global_attn_every_n_layers": 2, "local_attention": 4},
    "MobileBert": {**SIZE, **TEXT, "embedding_size": 8, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "XLNet": {
        "vocab_size": 40,
        "num_labels": 3,
        "pad_token_id": 0,
        "d_model": 16,
        "n_layer": 2,
        "n_head": 2,
        "d_inner": 24,
    },
    "Longformer": {**SIZE, **TEXT, "attention_window": [4, 4], "max_position_embeddings": 32},
}
CASES = [*ZOO, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.fixture
def zoo(tmp_path, memory_task):
    """Name of an architecture → a pool of two members around a base, and their tasks."""

    def make(name, noise):
        settings = {**ZOO, **MORE}[name]
        kind = name.split()[0]
        modality = "Image" if kind == "CLIP" else "Sequence"
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**settings)
        base = getattr(transformers, f"{kind}For{modality}Classification")(config).eval()
        generator = torch.Generator().manual_seed(1)

        def move(model, by):
            with torch.no_grad():
                for value in model.parameters():
                    value += by * torch.randn(value.shape, generator=generator)

        move(base, 0.15)
        base.save_pretrained(tmp_path / "base")
        paths, tasks = {}, {}
        for number, member in enumerate(("a", "b")):
            model = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32)
            move(model, noise)
            model.save_pretrained(tmp_path / member)
            paths[member] = str(tmp_path / member)
            draw = torch.Generator().manual_seed(number)
            if modality == "Image":
                tasks[member] = memory_task(member, model, {"pixel_values": torch.randn(20, 3, 8, 8, generator=draw)})
                continue
            mask = (torch.arange(9) < torch.randint(3, 10, (20, 1), generator=draw)).long()
            ids = torch.randint(4, 40, (20, 9), generator=draw) * mask
            tasks[member] = memory_task(member, model, {"input_ids": ids, "attention_mask": mask}, mask)
        return Pool.open(str(tmp_path / "base"), paths), tasks

    return make


@pytest.mark.parametrize("name", CASES)
def test_batches_change_rounding_only_and_identical_members_stay(zoo, name):
    pool, tasks = zoo(name, 0.05)
    merged = [
        propagate(pool, tasks, ["a", "b"], PropagationSettings(examples=20, batch_size=size)) for size in (20, 3, 1)
    ]
    first, *others = merged
    assert len(first.fits) > 4
    for other in others:
        assert [(fit.weights, fit.rows) for fit in other.fits] == [(fit.weights, fit.rows) for fit in first.fits]
        for weight, value in first.weights.items():
            torch.testing.assert_close(other.weights[weight], value, rtol=0, atol=2e-3, msg=weight)
    pool, tasks = zoo(name, 0.0)
    result = propagate(pool, tasks, ["a", "b"], PropagationSettings(examples=20, batch_size=7))
    for weight, value in result.weights.items():
        torch.testing.assert_close(value, pool.member_weight("a", weight), rtol=0, atol=5e-4, msg=weight)
