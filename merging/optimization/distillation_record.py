"""How far a distillation is, kept in a file that a run which was killed goes on from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.torch import save as serialize
from torch import Tensor

from merging.checkpoints.formats.safetensors_file import SafetensorsFile
from merging.errors import MergequestError
from merging.io import atomic, storage


@dataclass(frozen=True)
class Look:
    """What a look at the held-out examples showed.

    Args:
        step: Steps taken before it.
        held_out: Mean loss on the held-out examples.
        training: Mean loss of the steps since the look before; NaN before the first step.
    """

    step: int
    held_out: float
    training: float


@dataclass
class Record:
    """How far a distillation is, as it is kept on disk.

    Args:
        key: What the numbers depend on: another distillation does not go on from here.
        step: Steps that were taken.
        looks: Looks at the held-out examples so far.
        losses: Losses of the steps since the last look.
        best: Weights that were best so far, and the steps behind them.
    """

    key: str
    step: int = 0
    looks: list[Look] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: tuple[int, Mapping[str, Tensor]] | None = None

    @property
    def waited(self) -> int:
        """Looks since the best one. The start itself is not compared: it may have been fitted to these very examples."""
        losses = [look.held_out for look in self.looks if look.step]
        return len(losses) - 1 - int(np.argmin(losses)) if losses else 0

    def write(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Keeps itself and the workers' state in one file, whole or not at all."""
        tensors = dict(state)
        if self.best is not None:
            tensors |= {f"best:{name}": value for name, value in self.best[1].items()}
        about = {
            "key": self.key,
            "step": self.step,
            "looks": [[look.step, look.held_out, look.training] for look in self.looks],
            "losses": self.losses,
            "best": None if self.best is None else self.best[0],
        }
        atomic.write_bytes(path, serialize(tensors, {"distillation": json.dumps(about)}))

    @classmethod
    def read(cls, path: str, key: str) -> "tuple[Record, dict[str, Tensor]] | None":
        """What was kept under this key; None where there is nothing, or of another distillation."""
        if not storage.exists(path):
            return None
        try:
            file = SafetensorsFile.open(path)
            about: dict[str, Any] = json.loads(file.metadata["distillation"])
            if about["key"] != key:
                return None
            tensors = {name: file.read(name).clone() for name in file.tensors}
        except (MergequestError, KeyError, ValueError):
            return None
        best = {name.removeprefix("best:"): value for name, value in tensors.items() if name.startswith("best:")}
        record = cls(
            key,
            about["step"],
            [Look(*look) for look in about["looks"]],
            about["losses"],
            None if about["best"] is None else (about["best"], best),
        )
        return record, {name: value for name, value in tensors.items() if not name.startswith("best:")}
