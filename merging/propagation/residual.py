"""Which tensor a layer's output is added to, found by looking for sums among all that passes between modules."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from merging.propagation.paused_forward import HookPoint

SAMPLES = 256
"""Entries of a tensor that stand for it."""
TOLERANCE = 1e-4
"""Relative to the largest entry of the sum; rounding in float32 stays far below."""
REACH = 8
"""Different tensors of its shape after a layer's output, among which its sum with the residual is looked for."""


@dataclass(frozen=True)
class _Sight:
    """A tensor that passed: when, where, and some of its entries in float64."""

    order: int
    place: HookPoint
    shape: tuple[int, ...]
    entries: Tensor


class Sights:
    """All floating-point tensors that pass between modules in one forward pass."""

    def __init__(self) -> None:
        self._seen: list[_Sight] = []
        self._calls: Counter[tuple[str, bool]] = Counter()
        self._order = 0

    def add(self, path: str, values: Any, *, output: bool) -> int:
        """Remembers what goes into a module, or comes out of it; returns its rank in time."""
        self._order += 1
        self._calls[path, output] += 1
        for leaf, value in enumerate(tree_flatten(values)[0]):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                self._seen.append(
                    _Sight(self._order, HookPoint(path, output, leaf), tuple(value.shape), _entries(value))
                )
        return self._order

    def residual(self, path: str, before: int) -> HookPoint | None:
        """Where the tensor passes that a layer's output is added to.

        Args:
            path: The layer.
            before: Rank in time up to which it must have passed.

        Returns:
            The last such place, of a module that runs once; None where no sum is found (the output is normalised or
            scaled first, or goes into no residual stream).
        """
        written = next((sight for sight in self._seen if sight.place == HookPoint(path, True, 0)), None)
        if written is None:
            return None
        alike = [sight for sight in self._seen if sight.shape == written.shape]
        earlier = [s for s in alike if s.order <= before and self._calls[s.place.path, s.place.output] == 1]
        distinct: list[Tensor] = [written.entries]
        for sight in alike:
            if sight.order <= written.order or any(torch.equal(sight.entries, known) for known in distinct):
                continue
            if len(distinct) > REACH:
                break
            distinct.append(sight.entries)
            wanted = sight.entries - written.entries
            bound = TOLERANCE * float(sight.entries.abs().max())
            for candidate in reversed(earlier):
                if float((candidate.entries - wanted).abs().max()) <= bound:
                    return candidate.place
        return None


def _entries(value: Tensor) -> Tensor:
    """Evenly spaced entries of a tensor, on the CPU."""
    flat = value.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device=flat.device).long()
    return flat[places].double().cpu()
