import pytest
import torch

from merging.optimization.divergence import divergence, example_means, wanted_outputs


def reference(own, other, likelihood, temperature):
    """In float64, entry by entry."""
    own, other = own.double(), other.double()
    if likelihood == "gaussian":
        return 0.5 * ((own - other) ** 2).sum(-1)
    if likelihood == "bernoulli":
        q, p = torch.sigmoid(own / temperature), torch.sigmoid(other / temperature)
        return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
    q, p = (own / temperature).softmax(-1), (other / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_divergence_is_that_of_its_formula(likelihood, temperature):
    own, other = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    own.requires_grad_(True)
    result = divergence(own, wanted_outputs(other, likelihood, temperature, 5), likelihood, temperature)
    wanted = reference(own, other, likelihood, temperature)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(result.sum(), own, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted.sum(), own)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    nothing = divergence(other, wanted_outputs(other, likelihood, temperature), likelihood, temperature)
    assert nothing.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_classes_and_all_others_as_one(temperature):
    own, other = 3 * torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
    wanted = wanted_outputs(other, "categorical", temperature, 4)
    assert wanted["classes"].shape == (6, 4)
    q, p = ((one.double() / temperature).softmax(-1) for one in (own, other))
    top = wanted["classes"].long()
    q, p = (torch.cat([one.gather(1, top), 1 - one.gather(1, top).sum(1, keepdim=True)], 1) for one in (q, p))
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    result = divergence(own, wanted, "categorical", temperature)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)
    assert (result <= divergence(own, {"logits": other}, "categorical", temperature) + 1e-5).all()


def test_means_of_examples_with_different_numbers_of_rows():
    result = example_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 0, 1]))
    assert result.tolist() == [2.0, 0.0, 5.0]
