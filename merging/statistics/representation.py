"""What a member makes of each example: one vector, pooled from its last hidden states."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from merging.errors import StatisticsError
from merging.statistics.capture.layers import device_of, token_count
from merging.statistics.capture.single_examples import single_examples
from merging.statistics.statistic import Partial, Statistic, StatisticSettings, register
from merging.tasks.task import Batch, Task

SPREAD = 1e-6
"""Differences among examples below this share of the largest entry are rounding."""

ROUNDING, ROUNDING_IN_16_BITS = 1e-5, 1e-2
"""Changes of a state below this share of its largest entry are none."""


class RepresentationSettings(StatisticSettings):
    """Settings of representations."""

    pooling: Literal["cls", "mean"] = Field(
        "cls",
        description="cls: the state of the token that sees all others, the first one, or a decoder's last one; mean: the "
        "mean over real tokens.",
    )


@register
class Representation(Statistic):
    """One row an example. Similarities of members are taken over examples that all of them were shown."""

    kind: ClassVar[str] = "representation"
    version: ClassVar[int] = 2
    settings_type: ClassVar[type[StatisticSettings]] = RepresentationSettings
    settings: RepresentationSettings

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """One forward pass a batch; rows float32 [D], by the example's position.

        With `cls`, an example of the first batch runs twice more: whether a model is a decoder shows in its first token,
        whose state the tokens behind it don't change.

        Raises:
            StatisticsError: The batches hold an example twice.
        """
        partial = Partial()
        last: bool | None = None
        with torch.no_grad():
            for batch in batches:
                batch = batch.to(device_of(model))
                if last is None and self.settings.pooling == "cls":
                    last = _sees_only_what_is_before(model, task, batch)
                pooled = self._pool(task.representation(model, batch), batch.mask, bool(last)).float().cpu()
                rows = dict(zip(batch.indices.tolist(), pooled.unbind(), strict=True))
                counts = {"examples": len(batch.indices), "tokens": token_count(batch)}
                partial = partial.combine(Partial(counts=counts, rows=rows))
        return partial

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """`representation` [examples, D] float32, ordered by `positions` [examples] int64.

        Raises:
            StatisticsError: It was computed over no examples, holds NaN or Inf, or is the same for all examples.
        """
        if not partial.rows:
            raise StatisticsError("representations were computed over no examples: give their task's split some")
        positions = sorted(partial.rows)
        rows = torch.stack([partial.rows[position] for position in positions])
        if not rows.isfinite().all():
            bad = positions[int((~rows.isfinite()).any(1).nonzero()[0])]
            raise StatisticsError(f"the representation of example {bad} holds NaN or Inf: leave the member out")
        if len(rows) > 1 and float((rows - rows[0]).abs().max()) <= SPREAD * float(rows.abs().max()):
            other = "mean" if self.settings.pooling == "cls" else "cls"
            raise StatisticsError(
                f"all {len(rows)} examples have the same representation, which tells nothing of them: use pooling: {other}, "
                "or look whether the examples differ"
            )
        return {"representation": rows, "positions": torch.tensor(positions, dtype=torch.int64)}

    def _pool(self, states: Tensor, mask: Tensor | None, last: bool) -> Tensor:
        """[N, S, D] to [N, D]."""
        if mask is None or mask.shape != states.shape[:2]:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if self.settings.pooling == "cls":
            real = mask.bool().int()
            places = real.shape[1] - 1 - real.flip(1).argmax(1) if last else real.argmax(1)
            return states[torch.arange(len(states), device=states.device), places]
        weights = mask.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _sees_only_what_is_before(model: nn.Module, task: Task, batch: Batch) -> bool:
    """Whether the first token's state stays as it is where all tokens behind it are others."""
    ids = batch.inputs.get("input_ids")
    if ids is None or batch.mask is None or ids.shape != batch.mask.shape:
        return False
    longest = int(batch.mask.sum(1).argmax())
    one = list(single_examples(batch, unpadded=True))[longest]
    real = one.mask.bool() if one.mask is not None else torch.ones_like(ids[:1], dtype=torch.bool)
    first = int(real[0].int().argmax())
    behind = real & (torch.arange(real.shape[1], device=real.device) > first)
    if not behind.any():
        return False
    # Tokens that the batch has, so that the model knows them.
    known = torch.unique(ids[batch.mask.bool()])
    place = torch.searchsorted(known, one.inputs["input_ids"])
    others = known[(place + 1) % len(known)]
    changed = {**one.inputs, "input_ids": torch.where(behind, others, one.inputs["input_ids"])}
    states = [
        task.representation(model, Batch(inputs, one.labels, one.indices, one.mask)) for inputs in (one.inputs, changed)
    ]
    if len(known) < 2 or states[0].shape[:2] != real.shape:
        return False
    before, after = states[0][0, first].float(), states[1][0, first].float()
    rounding = ROUNDING if torch.finfo(states[0].dtype).bits > 16 else ROUNDING_IN_16_BITS
    return float((after - before).abs().max()) <= rounding * float(before.abs().max())
