"""What a statistic is: sums over examples that can be taken in any order and on any machine."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from merging.errors import StatisticsError
from merging.registry import Registry
from merging.tasks.task import Batch, Task


class StatisticSettings(BaseModel):
    """What every kind of statistic is told in the campaign file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    examples: int = Field(256, ge=1, description="Examples of a member's training split to compute it from.")
    batch_size: int = Field(16, ge=1, description="Examples per step; changes rounding only.")

    def key(self) -> dict[str, Any]:
        """The settings that the numbers depend on, JSON-like."""
        return self.model_dump(mode="json", exclude={"batch_size"})


Block = tuple[tuple[str, int, int], ...]
"""Parts of sums that lie behind each other: name, first row, row after the last."""


@dataclass
class Partial:
    """A statistic of some examples: sums that add up, with the counts that they are sums over.

    Args:
        sums: Parameter name (as in the member's checkpoint) to a float32 or float64 sum.
        counts: What was summed over: `examples`, `tokens`.
        rows: Example position → one row; for statistics that keep each example's own result.
        shared: Parameter name → the name that holds the same tensor (q, k and v share one Gram).
        transposed: Names of weights that are stored [in, out], not [out, in].
        unreached: Names of weights that no row reached (an expert's): their sum is 0, and not stored.
        uncovered: Names of the model's other matrices that have no such sum, though others have: theirs is not known.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()

    def combine(self, other: "Partial") -> "Partial":
        """The statistic of both sets of examples, which must be disjoint; adds into this object.

        Associative, and equal in any order up to rounding.

        Raises:
            StatisticsError: The two are of different models, or share examples.
        """
        if not self.counts:
            return other
        if not other.counts:
            return self
        if self._lacks(other) or other._lacks(self):
            raise StatisticsError("parts of a statistic were computed from different models")
        if both := self.rows.keys() & other.rows.keys():
            raise StatisticsError(f"parts of a statistic both hold example {min(both)}")
        self.uncovered = tuple(sorted({*self.uncovered, *other.uncovered}))
        for first, second in ((self, other), (other, self)):
            first._own(name for name, holder in first.shared.items() if second.shared.get(name) != holder)
            first._leave_out(self.uncovered)
        for name, value in other.sums.items():
            if name in self.sums:
                self.sums[name] += value
            else:
                self.sums[name] = value
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.rows.update(other.rows)
        self.transposed = tuple(sorted({*self.transposed, *other.transposed}))
        known = {*self.sums, *self.shared, *self.uncovered}
        self.unreached = tuple(sorted({*self.unreached, *other.unreached} - known))
        return self

    def outline(self) -> "Partial":
        """The same without numbers: sums of the same shapes on the device `meta`; what outlines combine to is the outline."""
        return replace(
            self,
            sums={name: value.to("meta") for name, value in self.sums.items()},
            counts=dict(self.counts),
            rows=dict(self.rows),
            shared=dict(self.shared),
        )

    def blocks(self, most: int) -> list[Block]:
        """All sums in the order of their names, in blocks of at most so many bytes, or of one row that has more."""
        made: list[list[tuple[str, int, int]]] = []
        left = 0
        for name in sorted(self.sums):
            height, size = _rows(self.sums[name])
            step = max(1, most // max(1, size))
            for start in range(0, height, step):
                stop = min(start + step, height)
                need = (stop - start) * size
                if not made or need > left:
                    made.append([])
                    left = most
                made[-1].append((name, start, stop))
                left -= need
        return [tuple(block) for block in made]

    def block(self, block: Block) -> dict[str, Tensor]:
        """What this one has of some parts of the whole: views of its sums, that of the name's holder where it shares one."""
        views = {}
        for name, start, stop in block:
            value = self.sums.get(self.shared.get(name, name))
            if value is not None:
                views[name] = value[start:stop] if value.dim() else value
        return views

    def of_block(self, block: Block, sums: Mapping[str, Tensor]) -> "Partial":
        """A partial of one block of these sums, with the counts that belong to its rows."""
        counts = {name: count for name, count in self.counts.items() if name in ("examples", "tokens") or name in sums}
        for name, start, stop in block:
            if f"{name}[0]" in self.counts:
                counts |= {f"{name}[{row - start}]": self.counts[f"{name}[{row}]"] for row in range(start, stop)}
        return Partial(dict(sums), counts)

    def _lacks(self, other: "Partial") -> bool:
        """Whether the other has a sum that this one neither has nor knows that it has not (an expert nobody reached)."""
        return bool({*other.sums, *other.shared} - {*self.sums, *self.shared, *self.unreached, *self.uncovered})

    def _leave_out(self, names: Iterable[str]) -> None:
        """Forgets sums that are not those of all examples."""
        gone = set(names)
        self._own(name for name, holder in self.shared.items() if holder in gone)
        for name in gone:
            self.sums.pop(name, None)
            self.counts.pop(name, None)

    def _own(self, names: Iterable[str]) -> None:
        """Gives names that share another's sum one of their own."""
        for name in list(names):
            holder = self.shared.pop(name)
            self.sums[name] = self.sums[holder].clone()
            if holder in self.counts:
                self.counts[name] = self.counts[holder]


def _rows(value: Tensor) -> tuple[int, int]:
    """How many rows a sum has, and bytes of each."""
    height = len(value) if value.dim() else 1
    return height, value.numel() * value.element_size() // max(1, height)


class Statistic(ABC):
    """A kind of statistic.

    Args:
        settings: What the campaign file says of it.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    """Raised whenever the same settings give other numbers: part of the cache's key."""
    settings_type: ClassVar[type[StatisticSettings]] = StatisticSettings

    def __init__(self, settings: StatisticSettings) -> None:
        self.settings = settings

    @abstractmethod
    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """Accumulates over batches; one pass of the model over each.

        Args:
            model: The member's live model, in evaluation mode, on the device to use.
            task: Gives logits and representations.
            batches: On the CPU. The next is asked for once the one before was added, and may have to be waited for.

        Returns:
            Sums on the CPU.
        """

    @abstractmethod
    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """What is kept of a complete sum: means, float32, by parameter name.

        Large sums are given in blocks of rows, and each row is kept by itself: in float32, in the sum's shape.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """

    def key(self) -> dict[str, Any]:
        """What, beside weights and data, the numbers depend on."""
        return {"statistic": self.kind, "version": self.version, **self.settings.key()}


STATISTICS: Registry[type[Statistic]] = Registry("statistic", StatisticsError)


def register(statistic: type[Statistic]) -> type[Statistic]:
    """Class decorator: makes a statistic known by its kind."""
    STATISTICS.register(statistic.kind, statistic)
    return statistic
