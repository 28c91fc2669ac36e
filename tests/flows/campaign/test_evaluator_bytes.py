import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from flows.campaign.open_campaign import OpenCampaign
from merging.checkpoints.pool import Pool

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize("transport", ["store", "nixl"])
def test_an_evaluator_of_a_16_bit_pool_holds_float32(tmp_path, transport):
    """Models, what methods make of members, and the candidates that wait are float32, whatever the pool is stored in."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        paths = {name: str(tmp_path / str(dtype) / name) for name in ("base", "one", "two")}
        for seed, path in enumerate(paths.values()):
            torch.manual_seed(seed)
            BertModel(BertConfig(**CONFIG)).to(dtype).save_pretrained(path)
        pool = Pool.open(paths.pop("base"), paths, ())
        campaign = SimpleNamespace(
            search=SimpleNamespace(methods={"regmean": None}), resources=SimpleNamespace(transport=transport)
        )
        opened = OpenCampaign(campaign, pool, {}, {}, {})
        found[dtype] = opened.evaluator_bytes(), opened.evaluator_bytes(sharded=True)
        parameters = sum(math.prod(info.shape) for info in pool.weights.values())
        waiting = 2 if transport == "nixl" else 1
        assert found[dtype][0] - (1 << 30) >= 4 * parameters * (1 + 2)  # the model, and a copy of each member
        assert found[dtype][1] - (1 << 30) >= 4 * parameters * (1 + waiting)
    assert found[torch.float32] == found[torch.bfloat16]
