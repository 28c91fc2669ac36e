"""What a model said of single examples: what scores are made of, and what pairs two candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """Predictions of some examples, in the order in which they were asked for.

    Whoever compares candidates knows only values, surrogates and losses; the payload belongs to the kind of task.

    Args:
        values: What the metric averages, per example [N], greater is better; of a metric of all predictions together, the
            surrogate.
        surrogates: A smooth stand-in for `values` [N], greater is better; None where the kind has none.
        losses: Per example [N]; None where the kind has none.
        entropies: Of the predicted distributions, in nats, per example [N]; None where the kind has none. Asks for no labels.
        payload: Name → array [N, …], for metrics of all predictions together.
        seconds: Wall time that it took.
    """

    values: Floats
    surrogates: Floats | None = None
    losses: Floats | None = None
    entropies: Floats | None = None
    payload: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Several, one after another."""
        return cls(
            np.concatenate([part.values for part in parts]),
            _joined([part.surrogates for part in parts]),
            _joined([part.losses for part in parts]),
            _joined([part.entropies for part in parts]),
            {
                name: np.concatenate([part.payload[name] for part in parts])
                for name in parts[0].payload
                if all(name in part.payload for part in parts)
            },
            sum(part.seconds for part in parts),
        )

    def take(self, places: npt.NDArray[np.int64]) -> "Predictions":
        """Those at some places of this order; they count no seconds."""
        return Predictions(
            self.values[places],
            None if self.surrogates is None else self.surrogates[places],
            None if self.losses is None else self.losses[places],
            None if self.entropies is None else self.entropies[places],
            {name: array[places] for name, array in self.payload.items()},
        )


def _joined(parts: Sequence[Floats | None]) -> Floats | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
