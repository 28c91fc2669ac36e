"""Choices scored behind one pass over their prompt, by the keys and values that it leaves."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from merging.tasks.file_task import longest_first
from merging.tasks.language.prompts import Encoded
from merging.tasks.language.token_padding import padded
from merging.tasks.predictions import Floats

CACHES = ("cache", "past_key_values")
"""What models call the keys and values that they go on from, and give back; by transformers' version."""
PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers' caches that hold keys and values alone, one a position."""


class Forward(Protocol):
    """A model's forward pass at positions that do not count the padding."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], keep: int) -> Any:
        """The model's output, with logits of at least the last `keep` positions."""
        ...


def have_one_prompt(choices: Sequence[Encoded]) -> bool:
    """Whether they begin alike up to where each starts."""
    first = choices[0]
    return all(other.start == first.start and other.prompt_ids == first.prompt_ids for other in choices)


def choice_likelihoods(
    model: nn.Module,
    forward: Forward,
    argument: str,
    groups: Sequence[Sequence[Encoded]],
    batch_size: int,
    padding: int,
) -> Floats | None:
    """Summed log-likelihood of every choice's tokens, group after group; float64 [all choices].

    Args:
        model: A causal model.
        forward: Runs it.
        argument: Which of `CACHES` it takes.
        groups: Choices that have one prompt (`have_one_prompt`).
        batch_size: Sequences per pass.
        padding: Token id.

    Returns:
        None where the model leaves nothing that a pass could go on from.
    """
    device = next(model.parameters()).device
    firsts = np.cumsum([0, *map(len, groups)])
    sums = np.zeros(firsts[-1])
    for places in longest_first([group[0].start for group in groups], batch_size):
        ids, mask = padded([groups[place][0].prompt_ids for place in places], padding, left=True)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        output = forward(model, {**inputs, "use_cache": True}, 1)
        log_p = log_softmax(output.logits[:, -1].float(), dim=-1)
        rows = [
            (row, firsts[place] + n, one) for row, place in enumerate(places) for n, one in enumerate(groups[place])
        ]
        chosen = log_p[[row for row, _, _ in rows], [one.ids[one.start] for _, _, one in rows]]
        sums[[number for _, number, _ in rows]] = chosen.double().cpu()
        rows = [entry for entry in rows if entry[2].targets > 1]
        if not rows:
            continue
        cache = next((cached for name in CACHES if (cached := getattr(output, name, None)) is not None), None)
        if any(type(layer).__name__ not in PLAIN_LAYERS for layer in getattr(cache, "layers", [None])):
            return None
        for part in longest_first([one.targets for _, _, one in rows], batch_size):
            chunk = [rows[place] for place in part]
            past: Any = copy.deepcopy(cache)
            before = torch.tensor([row for row, _, _ in chunk], device=device)
            past.batch_select_indices(before)
            sums[[number for _, number, _ in chunk]] += _rest(
                model,
                forward,
                {argument: past},
                inputs["attention_mask"][before],
                [one for _, _, one in chunk],
                padding,
            )
    return sums


def _rest(
    model: nn.Module, forward: Forward, past: Mapping[str, Any], mask: Tensor, choices: Sequence[Encoded], padding: int
) -> Floats:
    """Summed log-likelihood of the tokens after each choice's first; float64 [N]."""
    ids, real = padded([one.ids[one.start : -1] for one in choices], padding, left=False)
    wanted, _ = padded([one.ids[one.start + 1 :] for one in choices], padding, left=False)
    inputs = {"input_ids": ids.to(mask.device), "attention_mask": torch.cat([mask, real.to(mask.device)], dim=1)}
    output = forward(model, {**inputs, **past, "use_cache": True}, ids.shape[1])
    log_p = log_softmax(output.logits[:, -ids.shape[1] :].float(), dim=-1)
    chosen = log_p.gather(2, wanted.to(mask.device)[..., None])[..., 0].double()
    sums: Floats = torch.where(real.to(mask.device).bool(), chosen, 0.0).sum(1).cpu().numpy()
    return sums
