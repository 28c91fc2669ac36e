import copy

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merging.checkpoints.delta_products import inner_products
from merging.checkpoints.pool import Pool


def test_inner_products_of_all_pairs(tiny_pool):
    members = {name: str(path) for name, path in tiny_pool.items() if name != "base"}
    pool = Pool.open(str(tiny_pool["base"]), members)
    vectors = [
        torch.cat([(pool.member_weight(m, n).double() - pool.base_weight(n).double()).flatten() for n in pool.weights])
        for m in members
    ]
    expected = torch.stack([torch.stack([a @ b for b in vectors]) for a in vectors]).numpy()
    assert np.allclose(inner_products(pool), expected, rtol=1e-5, atol=1e-6)


def test_long_sums_are_exact(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40_000, hidden_size=40, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    members = {}
    for name in ("a", "b"):
        member = copy.deepcopy(base)
        with torch.no_grad():
            for value in member.parameters():
                value.add_(1e-3 * torch.randn_like(value) + 5e-4)
        member.save_pretrained(tmp_path / name)
        members[name] = str(tmp_path / name)
    pool = Pool.open(str(tmp_path / "base"), members)
    vectors = [
        torch.cat([(pool.member_weight(m, n).double() - pool.base_weight(n).double()).flatten() for n in pool.weights])
        for m in members
    ]
    expected = torch.stack([torch.stack([a @ b for b in vectors]) for a in vectors]).numpy()
    assert np.allclose(inner_products(pool), expected, rtol=1e-9, atol=0)
