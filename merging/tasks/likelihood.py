"""What logits are parameters of: losses, surrogates, entropies and divergences of single examples, all differentiable."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Likelihood: TypeAlias = Literal["categorical", "bernoulli", "gaussian"]
"""One class; several labels, each yes or no; or numbers, the means of normal distributions of unit variance."""


def losses(likelihood: Likelihood, logits: Tensor, labels: Tensor) -> Tensor:
    """Each example's share of the loss that transformers trains with.

    Args:
        likelihood: What the logits are parameters of.
        logits: [N, C].
        labels: Class indices [N], or 0 and 1, or numbers, in the shape of the logits.

    Returns:
        [N]: cross-entropy; the mean over labels of binary cross-entropies; the mean over outputs of squared errors.
    """
    if likelihood == "categorical":
        return F.cross_entropy(logits, labels, reduction="none")
    wanted = labels.to(logits).view_as(logits)
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    return (logits - wanted).square().mean(1)


def surrogates(likelihood: Likelihood, logits: Tensor, labels: Tensor, spread: float = 1.0) -> Tensor:
    """A smooth stand-in for right and wrong, between 0 and 1: e to the minus loss.

    Of one class that is p_y; of several labels the geometric mean of the probabilities of the true ones; of numbers
    exp(−(z − y)² / s²).

    Args:
        likelihood: What the logits are parameters of.
        logits: [N, C].
        labels: See `losses`.
        spread: s, the size of the differences that matter among numbers.

    Returns:
        [N].
    """
    loss = losses(likelihood, logits, labels)
    return (-loss / spread**2 if likelihood == "gaussian" else -loss).exp()


def entropies(likelihood: Likelihood, logits: Tensor) -> Tensor | None:
    """Of each example's predicted distribution, in nats [N]; None of numbers, whose spread is not predicted."""
    if likelihood == "categorical":
        return _entropy(logits.softmax(-1)).sum(-1)
    if likelihood == "bernoulli":
        return (_entropy(logits.sigmoid()) + _entropy((-logits).sigmoid())).sum(-1)
    return None


def _entropy(p: Tensor) -> Tensor:
    """−p log p, 0 at 0."""
    terms: Tensor = torch.special.entr(p)
    return terms


def divergences(likelihood: Likelihood, logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of what `logits` say from what `wanted` say, of each row.

    Args:
        likelihood: What the logits are parameters of.
        logits: [N, C].
        wanted: [N, C], whose distribution is to be met.

    Returns:
        [N]: of one class; the sum over labels, each yes or no; half the squared difference of numbers (unit variance).
    """
    if likelihood == "categorical":
        return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    if likelihood == "bernoulli":
        yes, no = wanted.sigmoid(), (-wanted).sigmoid()
        gained = F.logsigmoid(wanted) - F.logsigmoid(logits), F.logsigmoid(-wanted) - F.logsigmoid(-logits)
        return (yes * gained[0] + no * gained[1]).sum(-1)
    return (logits - wanted).square().sum(-1) / 2
