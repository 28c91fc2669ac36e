"""What a member makes of each example: one vector, pooled from its last hidden states."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from merging.errors import StatisticsError
from merging.statistics.capture.layers import device_of, token_count
from merging.statistics.statistic import Partial, Statistic, StatisticSettings, register
from merging.tasks.task import Batch, Task


class RepresentationSettings(StatisticSettings):
    """Settings of representations."""

    pooling: Literal["cls", "mean"] = Field(
        "cls", description="cls: the first token's state; mean: the mean over real tokens."
    )


@register
class Representation(Statistic):
    """One row an example. Similarities of members are taken over examples that all of them were shown."""

    kind: ClassVar[str] = "representation"
    version: ClassVar[int] = 1
    settings_type: ClassVar[type[StatisticSettings]] = RepresentationSettings
    settings: RepresentationSettings

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """One forward pass a batch; rows float32 [D], by the example's position.

        Raises:
            StatisticsError: The batches hold an example twice.
        """
        partial = Partial()
        with torch.no_grad():
            for batch in batches:
                batch = batch.to(device_of(model))
                pooled = self._pool(task.representation(model, batch), batch.mask).float().cpu()
                rows = dict(zip(batch.indices.tolist(), pooled.unbind(), strict=True))
                counts = {"examples": len(batch.indices), "tokens": token_count(batch)}
                partial = partial.combine(Partial(counts=counts, rows=rows))
        return partial

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """`representation` [examples, D] float32, ordered by `positions` [examples] int64.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """
        if not partial.rows:
            raise StatisticsError("representations were computed over no examples: give their task's split some")
        positions = sorted(partial.rows)
        rows = torch.stack([partial.rows[position] for position in positions])
        if not rows.isfinite().all():
            bad = positions[int((~rows.isfinite()).any(1).nonzero()[0])]
            raise StatisticsError(f"the representation of example {bad} holds NaN or Inf: leave the member out")
        return {"representation": rows, "positions": torch.tensor(positions, dtype=torch.int64)}

    def _pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """[N, S, D] to [N, D]."""
        if self.settings.pooling == "cls":
            return states[:, 0]
        if mask is None or mask.shape != states.shape[:2]:
            return states.mean(1)
        weights = mask.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
