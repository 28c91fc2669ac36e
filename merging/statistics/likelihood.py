"""What is differentiated for a Fisher: functions of the logits whose squared gradients add up to it."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from merging.errors import StatisticsError
from merging.statistics.statistic import StatisticSettings
from merging.tasks.likelihood import Likelihood
from merging.tasks.task import IGNORED, UNKNOWN, Batch


class LikelihoodSettings(StatisticSettings):
    """Settings of the statistics that come from gradients of log p(label | example)."""

    estimator: Literal["exact", "sampled", "empirical"] | None = Field(
        None,
        description="exact: expectation over the classes; sampled: one label drawn from the model; empirical: the label in the "
        "data. Default: exact where an example has one label, sampled where it has one for every token.",
    )
    seed: int = Field(0, ge=0, description="Seed of the sampled labels.")

    def chosen(self, one_label: bool) -> Literal["exact", "sampled", "empirical"]:
        """The estimator for examples that have one label, or one for every token."""
        return self.estimator or ("exact" if one_label else "sampled")

    def key(self) -> dict[str, Any]:
        """The settings that the numbers depend on: the seed only where something is drawn."""
        left_out = {"batch_size"} if self.estimator in ("sampled", None) else {"batch_size", "seed"}
        return self.model_dump(mode="json", exclude=left_out)


def objectives(
    logits: Tensor, batch: Batch, settings: LikelihoodSettings, likelihood: Likelihood = "categorical"
) -> list[Tensor]:
    """Scalars, each a sum with one term an example, whose squared per-example gradients add up to the Fisher.

    Args:
        logits: [N, C], or [N, S, C] with labels [N, S]: an example's log-likelihood sums over its targets.
        batch: Where they come from.
        settings: Which estimator.
        likelihood: What the logits are parameters of: one class; several labels, each yes or no; or numbers, the means
            of normal distributions of unit variance.

    Returns:
        One scalar for `sampled` and `empirical`; for `exact` C − 1 (see `multinomial_factor`), or C of several labels
        or numbers, which are independent.

    Raises:
        StatisticsError: `exact` with a label at every position; `empirical` without labels; one class.
    """
    settings = settings.model_copy(update={"estimator": settings.chosen(logits.dim() == 2)})
    if likelihood != "categorical":
        return _independent(logits, batch, settings, likelihood)
    if logits.shape[:-1] != batch.labels.shape:
        raise StatisticsError(
            f"the task gives logits {list(logits.shape)} for labels {list(batch.labels.shape)}: they must "
            "agree in all but the last extent"
        )
    if logits.shape[-1] < 2:
        raise StatisticsError("the task has one class, so its labels carry no information: its Fisher is zero")
    if settings.estimator == "exact":
        if logits.dim() != 2:
            raise StatisticsError(
                f"estimator 'exact' is for one label an example; these logits are {list(logits.shape)}. "
                "Use estimator: sampled, or empirical"
            )
        factor = multinomial_factor(logits.detach().double().softmax(-1)).to(logits.dtype)
        return [(factor[:, :, k] * logits).sum() for k in range(factor.shape[-1])]
    labels = sampled_labels(logits.detach(), batch, settings.seed) if settings.estimator == "sampled" else batch.labels
    unknown = (labels == IGNORED) if labels.dim() == 1 else (labels == UNKNOWN).any(1)
    if unknown.any():
        position = int(batch.indices[unknown.cpu()][0])
        raise StatisticsError(
            f"example {position} has no label, which estimator 'empirical' needs. Use exact, or sampled"
        )
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return [-loss]


def _independent(logits: Tensor, batch: Batch, settings: LikelihoodSettings, likelihood: Likelihood) -> list[Tensor]:
    """`objectives` of outputs that are independent given the example: F = Σ_c v_c (∇z_c)², v_c = σ(1 − σ), or 1."""
    if logits.dim() != 2:
        raise StatisticsError(
            f"these logits are {list(logits.shape)}: of several labels or of numbers there is one row an example, [N, C]"
        )
    values = logits.detach().double()
    chance = values.sigmoid()
    if settings.estimator == "exact":
        # σ(z) σ(−z): 1 − σ(z) would be 0 for a label that is nearly certain
        deviation = (chance * (-values).sigmoid()).sqrt() if likelihood == "bernoulli" else torch.ones_like(values)
        return [(deviation[:, c].to(logits.dtype) * logits[:, c]).sum() for c in range(logits.shape[1])]
    if settings.estimator == "sampled":
        generators = [np.random.default_rng((settings.seed, position)) for position in batch.indices.tolist()]
        width = logits.shape[1]
        if likelihood == "bernoulli":
            drawn = torch.from_numpy(np.stack([generator.random(width) for generator in generators])).to(values)
            labels = (drawn < chance).double()
        else:
            drawn = torch.from_numpy(np.stack([generator.standard_normal(width) for generator in generators]))
            labels = values + drawn.to(values)
    else:
        labels = _observed(logits, batch, likelihood)
    residual = labels - (chance if likelihood == "bernoulli" else values)
    return [(residual.to(logits.dtype) * logits).sum()]


def _observed(logits: Tensor, batch: Batch, likelihood: Likelihood) -> Tensor:
    """The labels in the data, float64 [N, C].

    Raises:
        StatisticsError: They have another shape, or are none.
    """
    labels = batch.labels.double()
    if labels.dim() == 1 and logits.shape[1] == 1:
        labels = labels[:, None]
    if labels.shape != logits.shape:
        raise StatisticsError(
            f"the task gives logits {list(logits.shape)} for labels {list(batch.labels.shape)}, and estimator 'empirical' "
            "needs a label for each of several outputs. Use exact, or sampled"
        )
    wrong = ~labels.isfinite() if batch.labels.is_floating_point() else labels == IGNORED
    if likelihood == "bernoulli":
        wrong = wrong | ((labels != 0) & (labels != 1))
    if wrong.any():
        position = int(batch.indices[wrong.any(1).cpu()][0])
        raise StatisticsError(
            f"example {position} has no {'yes or no' if likelihood == 'bernoulli' else 'number'} for every output, which "
            "estimator 'empirical' needs. Use exact, or sampled"
        )
    return labels


def multinomial_factor(p: Tensor) -> Tensor:
    """V [N, C, C − 1] with V Vᵀ = diag(p) − p pᵀ, for probabilities p [N, C] (Tanabe and Sagae, 1992).

    With J the Jacobian of the logits, Σ_c p_c (∇ log p_c)² = diag(Jᵀ (diag(p) − p pᵀ) J) = Σ_k (Jᵀ V_k)²:
    the exact Fisher in one backward pass fewer than there are classes. Column k sets class k against those
    after it, so that no difference of nearly equal numbers occurs, however certain the model is.
    """
    remaining = p.flip(-1).cumsum(-1).flip(-1)
    after = remaining[:, 1:]
    tiny = torch.finfo(p.dtype).tiny
    scale = (p[:, :-1] * (after / remaining[:, :-1].clamp_min(tiny))).sqrt()
    share = p[:, :, None] / after[:, None, :].clamp_min(tiny)
    factor = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[:, :-1] - share.tril(-1)
    return factor * scale[:, None, :]


def sampled_labels(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """A label drawn from the model for each target, in the shape of `batch.labels`.

    The draw depends on the seed, the example's position in its split and the target's rank in it, and on
    nothing else: neither sharding nor batch size nor padding changes it.
    """
    targets = batch.labels != IGNORED if batch.labels.dim() > 1 else torch.ones_like(batch.labels, dtype=torch.bool)
    per_example = targets.reshape(len(targets), -1).sum(1).tolist()
    draws = [
        np.random.default_rng((seed, position)).random(count)
        for position, count in zip(batch.indices.tolist(), per_example, strict=True)
    ]
    uniform = torch.from_numpy(np.concatenate(draws)).to(logits.device)
    cumulative = logits[targets].double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None]).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    labels = torch.full_like(batch.labels, IGNORED)
    labels[targets] = drawn.to(labels.dtype)
    return labels
