import pytest
import torch

from merging.methods import METHODS, Context, Weight
from merging.methods.spectral import esm


def pool(layers=1, tokens=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = []
    for layer in range(layers):
        base = torch.randn(12, 8, generator=g)
        inputs = {name: torch.randn(tokens, 8, generator=g) for name in "ab"}
        members = {name: base + 0.1 * (layer + 1) * torch.randn(12, 8, generator=g) for name in "ab"}
        grams = {name: x.T @ x / tokens for name, x in inputs.items()}
        weights.append(Weight(f"layers.{layer}.up.weight", base, members, {"gram": grams}))
    return weights


def test_directions_of_output_are_all_equally_strong(merge):
    (weight,) = pool()
    step = merge("esm", [weight], {"a": 1.0, "b": 1.0})[weight.name] - weight.base
    sizes = torch.linalg.svdvals(step)
    torch.testing.assert_close(sizes, sizes.mean().expand(8), rtol=1e-3, atol=0)


def test_a_layer_that_moved_more_than_others_of_its_kind_is_made_stronger(merge):
    weights, scaling = pool(layers=3), {"a": 0.8, "b": 0.8}
    plain, scaled = (merge("esm", weights, scaling, {"layers": layers}) for layers in (False, True))
    lengths = torch.stack([(w.members["a"] + w.members["b"] - 2 * w.base).norm() for w in weights])
    for w, length in zip(weights, lengths, strict=True):
        expected = w.base + (length / lengths.mean()) ** 2 * (plain[w.name] - w.base)
        torch.testing.assert_close(scaled[w.name], expected, rtol=1e-4, atol=1e-5)


def test_outputs_that_no_input_reaches_are_not_made_strong(merge):
    """A Gram of three tokens: the outputs of a member differ in three directions, and in no fourth."""
    (weight,) = pool(tokens=3)
    sizes = torch.linalg.svdvals(merge("esm", [weight], {"a": 1.0, "b": 1.0})[weight.name] - weight.base)
    assert sizes[6] < 1e-4 * sizes[0]


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_what_is_kept_of_members_changes_no_later_candidate(merge, monkeypatch, room):
    monkeypatch.setattr(esm, "KEPT_BYTES", room)
    weights = pool(layers=2)
    prepared = METHODS["esm"].prepare(weights, Context())
    for scaling in ({"a": 1.0, "b": 0.5}, {"a": 0.7}, {"b": 1.2, "a": 0.3}, {"a": 0.9, "b": 0.9}):
        out = {w.name: torch.empty_like(w.base) for w in weights}
        prepared.merge(scaling, METHODS["esm"].defaults(), out)
        for name, expected in merge("esm", weights, scaling).items():
            torch.testing.assert_close(out[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 8), (8, 8), (8, 12)])
@pytest.mark.parametrize("tokens", [3, 64])
def test_output_directions_are_those_of_the_outputs_themselves(outputs, inputs, tokens):
    """The singular vectors of what the task vector adds to each token's output, whichever side is the larger."""
    g = torch.Generator().manual_seed(outputs)
    moved = torch.randn(2, outputs, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(2, tokens, inputs, generator=g)
    directions, energies = esm.output_directions(moved, (x.mT @ x / tokens).double())
    expected = torch.linalg.svd(moved @ x.double().mT / tokens**0.5, full_matrices=False)
    rank = min(outputs, inputs, tokens)
    torch.testing.assert_close(energies[:, :rank], expected.S[:, :rank] ** 2, rtol=1e-4, atol=1e-9)
    assert not energies[:, rank:].any()
    alike = (directions[..., :rank] * expected.U[..., :rank]).sum(1).abs()
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=1e-4, atol=0)
