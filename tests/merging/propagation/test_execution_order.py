import pytest
import torch

from merging.propagation.execution_order import trace
from merging.propagation.used_positions import ALL, UsedPositions
from merging.statistics.capture.layers import layer_names

CLS, LAST = UsedPositions((0,)), UsedPositions((0,), from_end=True)


@pytest.fixture
def traced(given):
    """Layers of a tiny model, by path."""

    def run(kind):
        task = given(kind, members=1).tasks["m0"]
        model = task.load_model()
        paths = {path: path for path, module in model.named_modules() if module in layer_names(model)}
        (batch,) = task.batches("train", 0, 8, 8)
        return trace(model, task, paths, batch)

    return run


def ends(calls, *endings):
    return {path for path in calls if path.endswith(endings)}


@pytest.mark.parametrize(
    ("kind", "writers"),
    [
        ("bert", ("attention.output.dense", "output.dense")),
        ("llama", ("o_proj", "down_proj")),
        ("gpt2", ("c_proj",)),
        ("vit", ("attention.o_proj", "attention.output.dense", "output.dense", "mlp.fc2")),
        ("t5", (".o", ".wo")),
    ],
)
def test_the_layers_that_write_into_a_residual_stream_are_found(traced, kind, writers):
    calls = traced(kind)
    result = {path for path, call in calls.items() if call.residual}
    assert result == ends(calls, *writers)
    assert len(result) == (10 if kind == "t5" else 4)


def test_a_residual_passes_before_the_layer_reads(traced):
    calls = traced("llama")
    place = calls["model.layers.0.mlp.down_proj"].residual
    assert place.path.startswith("model.layers.0.post_attention_layernorm")
    assert not place.output
    assert calls["model.layers.1.self_attn.o_proj"].residual.path.startswith("model.layers.1")


def test_query_key_and_value_read_one_tensor(traced):
    calls = traced("llama")
    layer = "model.layers.0"
    sources = [calls[f"{layer}.self_attn.{name}_proj"].source for name in "qkv"]
    assert len(set(sources)) == 1
    assert calls[f"{layer}.mlp.gate_proj"].source == calls[f"{layer}.mlp.up_proj"].source
    assert len({call.source for path, call in calls.items() if path.startswith(layer)}) == 4


def test_layers_come_in_the_order_of_running(traced):
    calls = traced("bert")
    assert [call.order for call in calls.values()] == sorted(call.order for call in calls.values())
    assert list(calls)[-2:] == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize(
    ("kind", "rows", "last", "whole"),
    [
        ("bert", CLS, ("layer.1.attention.self.query", "layer.1.output.dense"), ("layer.1.attention.self.key",)),
        ("llama", LAST, ("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"), ("layers.1.self_attn.v_proj",)),
        ("gpt2", LAST, ("h.1.attn.c_proj", "h.1.mlp.c_proj"), ("h.1.attn.c_attn", "h.0.mlp.c_proj")),
    ],
)
def test_only_the_position_that_is_read_counts_in_the_last_block(traced, kind, rows, last, whole):
    calls = traced(kind)
    assert {calls[path].rows for path in ends(calls, *last)} == {rows}
    assert {calls[path].rows for path in ends(calls, *whole)} == {ALL}


def test_an_image_is_classified_by_its_first_position(traced):
    rows = [call.rows for call in traced("vit").values()]
    assert CLS in rows
    assert rows[0] == ALL


def test_a_decoder_is_told_from_its_encoder(traced):
    calls = traced("t5")
    assert {path for path, call in calls.items() if call.decoding} == {
        path
        for path in calls
        if path.startswith("decoder") and not path.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    } - {"lm_head"}


def test_a_layer_that_runs_twice_is_left_out(given):
    task = given("albert", members=1, count=8).tasks["m0"]
    model = task.load_model()
    paths = {path: path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    (batch,) = task.batches("train", 0, 8, 8)
    result = trace(model, task, paths, batch)
    assert set(result) == {"albert.encoder.embedding_hidden_mapping_in", "albert.pooler", "classifier"}
