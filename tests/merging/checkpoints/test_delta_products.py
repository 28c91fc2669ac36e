import numpy as np
import torch

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
