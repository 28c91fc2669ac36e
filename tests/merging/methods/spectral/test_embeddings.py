"""Embeddings as matrices, or as the tables of rows that they are."""

import pytest
import torch

from merging.methods import METHODS, Weight

SPECTRAL = [name for name in METHODS if "embeddings" in METHODS[name].parameters and "+" not in name]


def pool():
    g = torch.Generator().manual_seed(0)
    shapes = {
        "shared.weight": (9, 6),
        "encoder.embed_positions.weight": (5, 6),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (6, 6),
        "lm_head.weight": (9, 6),
    }
    return [
        Weight(name, base := torch.randn(shape, generator=g), {m: base + torch.randn(shape, generator=g) for m in "ab"})
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.5, 0.5), (0.4, 1.2)])
def test_with_embeddings_as_tables_they_are_the_mean_and_all_else_is_as_it_was(method, a, b, merge):
    weights, scaling = pool(), {"a": a, "b": b}
    matrices = merge(method, weights, scaling, {"embeddings": "matrix"})
    tables = merge(method, weights, scaling, {"embeddings": "mean"})
    for table in weights[:2]:
        mean = table.base + sum(scaling[m] * (table.members[m] - table.base) for m in scaling) / 2
        torch.testing.assert_close(tables[table.name], mean)
        assert not torch.allclose(matrices[table.name], mean, atol=1e-3)
    for name in ("encoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"):
        assert torch.equal(tables[name], matrices[name])


def test_t5_and_its_kin_have_tables():
    assert set(SPECTRAL) == {"ace", "wudi", "tsv_m", "iso_c", "iso_cts"}
    for method in SPECTRAL:
        for kind, expected in {"t5": "mean", "mt5": "mean", "bert": "matrix", "llama": "matrix", "": "matrix"}.items():
            assert METHODS[method].default_recipe(["a"], kind).parameters["embeddings"] == expected
