"""How far a model's outputs lie from a teacher's: what is minimised when outputs are distilled."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from merging.tasks.likelihood import Likelihood, divergences
from merging.tasks.task import IGNORED, Batch


def wanted_outputs(
    logits: Tensor, likelihood: Likelihood, temperature: float = 1.0, top_k: int | None = None
) -> dict[str, Tensor]:
    """What is kept of a teacher's logits, by name, each [rows, …].

    Args:
        logits: [rows, C].
        likelihood: What they are parameters of.
        temperature: Divides them.
        top_k: Of more classes than these, the likeliest are kept, and all others as one class.
    """
    if likelihood != "categorical" or top_k is None or logits.shape[-1] <= top_k:
        return {"logits": logits}
    likeliest = log_softmax(logits / temperature, -1).topk(top_k, -1)
    rest = log_softmax(logits / temperature, -1).scatter(-1, likeliest.indices, -torch.inf).logsumexp(-1)
    return {"log_p": likeliest.values, "classes": likeliest.indices.to(torch.int32), "log_rest": rest}


def divergence(
    logits: Tensor, wanted: Mapping[str, Tensor], likelihood: Likelihood, temperature: float = 1.0
) -> Tensor:
    """The Kullback–Leibler divergence of a model's distribution from a teacher's, row by row [rows].

    At a temperature T both are those of logits / T, and the divergence is multiplied by T², so that gradients stay of one
    size (Hinton et al. 2015). Of a Gaussian of unit variance it is half the squared difference, whatever the temperature.

    Args:
        logits: [rows, C].
        wanted: As `wanted_outputs` gave it at the same temperature.
        likelihood: What logits are parameters of.
        temperature: Above 0.
    """
    if "logits" in wanted:
        heat = 1.0 if likelihood == "gaussian" else temperature
        return heat**2 * divergences(likelihood, logits / heat, wanted["logits"] / heat)
    own = log_softmax(logits / temperature, -1)
    classes, other, rest = wanted["classes"].long(), wanted["log_p"], wanted["log_rest"]
    known = (other.exp() * (other - own.gather(-1, classes))).sum(-1)
    left = own.scatter(-1, classes, -torch.inf).logsumexp(-1)
    return temperature**2 * (known + rest.exp() * (rest - left))


def hidden_distance(own: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """‖h − h_t‖² / ‖h_t‖² of hidden states [N, S, D] over an example's real tokens, example by example [N]."""
    mask = real_positions(own, batch)
    counted = mask[..., None].to(own.dtype)
    dims = tuple(range(1, own.dim()))
    apart = ((own - wanted).square() * counted).sum(dims)
    return apart / (wanted.square() * counted).sum(dims).clamp_min(torch.finfo(own.dtype).tiny)


def real_positions(states: Tensor, batch: Batch) -> Tensor:
    """Which positions of hidden states [N, S, D] are real tokens [N, S]: of a decoder's, its targets."""
    for mask in (batch.mask, batch.labels != IGNORED):
        if mask is not None and mask.shape == states.shape[:-1]:
            return mask
    return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)


def target_rows(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits at the positions that have a target [rows, C], and how many rows each example has [N].

    Of several labels at once, which have the shape of the logits, an example is one row.
    """
    if not batch.is_sequential:
        return logits, torch.ones(len(logits), dtype=torch.long)
    targets = batch.labels != IGNORED
    return logits[targets], targets.sum(1).cpu()


def example_means(rows: Tensor, counts: Tensor) -> Tensor:
    """Means over each example's rows [N]; 0 for an example without any."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts).to(rows.device)
    sums = rows.new_zeros(len(counts)).index_add(0, owner, rows)
    return sums / counts.clamp_min(1).to(rows)
