import pytest
import torch

from merging.statistics.likelihood import (
    LikelihoodSettings,
    multinomial_factor,
    objectives,
    sampled_labels,
)
from merging.tasks.task import IGNORED, Batch


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_factor_squares_to_the_multinomial_covariance(classes):
    p = torch.randn(20, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    factor = multinomial_factor(p)
    assert factor.shape == (20, classes, classes - 1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(factor @ factor.transpose(1, 2), expected)


def test_factor_keeps_relative_precision_where_classes_are_nearly_excluded():
    p = torch.tensor([[1 - 2e-20, 1e-20, 1e-20], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    variances = multinomial_factor(p).square().sum(-1)
    torch.testing.assert_close(
        variances[0], torch.tensor([2e-20, 1e-20, 1e-20], dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert not variances[1:].any()


def test_labels_are_drawn_with_the_models_probabilities():
    p = torch.tensor([0.7, 0.2, 0.1])
    batch = Batch({}, torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000))
    labels = sampled_labels(p.log().expand(20_000, 3), batch, seed=0)
    shares = torch.bincount(labels, minlength=3) / 20_000
    assert float((shares - p).abs().max()) < 0.01


def test_draws_depend_on_the_position_and_not_on_batch_or_padding():
    logits = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, 6, dtype=torch.int64)
    labels[1, 3:] = IGNORED
    positions = torch.tensor([8, 2, 5, 11])
    together = sampled_labels(logits, Batch({}, labels, positions), seed=3)
    alone = sampled_labels(logits[1:2, :4], Batch({}, labels[1:2, :4], positions[1:2]), seed=3)
    assert torch.equal(alone[0], together[1, :4])
    assert (together[1, 3:] == IGNORED).all()
    assert not torch.equal(together, sampled_labels(logits, Batch({}, labels, positions), seed=4))


def test_the_default_estimator_follows_what_an_example_has():
    """Exact for one label, sampled for one at every token: the same scalars as by name."""
    batch = Batch({}, torch.tensor([1, 0]), torch.arange(2))
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    named = objectives(logits, batch, LikelihoodSettings(estimator="exact"))
    assert [float(value) for value in objectives(logits, batch, LikelihoodSettings())] == [
        float(value) for value in named
    ]
    tokens = Batch({}, torch.tensor([[1, -100], [0, 2]]), torch.arange(2))
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
    named = objectives(logits, tokens, LikelihoodSettings(estimator="sampled"))
    assert [float(value) for value in objectives(logits, tokens, LikelihoodSettings())] == [
        float(value) for value in named
    ]
