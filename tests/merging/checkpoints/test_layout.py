import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.methods import METHODS


def open_pool(model, place):
    torch.manual_seed(0)
    model.save_pretrained(place / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(place / "a")
    return Pool.open(str(place / "base"), {"a": str(place / "a")})


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return open_pool(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


def test_gpt2_stores_its_layers_turned_square_ones_too(gpt2):
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert gpt2.transposed == {f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers}


def test_linear_layers_are_not_turned(tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    assert open_pool(BertModel(config), tmp_path).transposed == frozenset()


def test_a_method_is_told_without_statistics_where_it_asks(gpt2):
    def transposed(method):
        given = Material(gpt2).weights(gpt2.weights, (), torch.device("cpu"), METHODS[method].extras)
        return {weight.name for weight in given if weight.transposed}

    assert transposed("iso_cts") == gpt2.transposed
    assert transposed("iso_c") == set()
