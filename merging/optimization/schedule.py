"""Which examples a step trains on, and how fast: fixed by a seed, so that any step can be found again."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from merging.tasks.task import Task

Places: TypeAlias = npt.NDArray[np.int64]
"""Places of examples in their split's fixed order [N]."""
WINDOW = 16
"""Steps, or batches, whose examples are sorted by length together: enough to save padding, few enough to stay random."""
CHUNK = 256


class Schedule:
    """Every pass has each example once, each step examples of all tasks in their proportions, of similar lengths.

    Args:
        places: A task's examples each.
        lengths: Their tokens.
        batch: Examples a step, all tasks together; but for rounding.
        seed: Of the order.
    """

    def __init__(self, places: Sequence[Places], lengths: Sequence[Places], batch: int, seed: int) -> None:
        self._places, self._lengths, self._seed = places, lengths, seed
        self.steps_a_pass = max(1, round(sum(map(len, places)) / batch))
        self._pass = lru_cache(maxsize=1)(self._made)

    def step(self, number: int) -> list[Places]:
        """The examples of a step, counted from the first pass on, task by task."""
        return self._pass(number // self.steps_a_pass)[number % self.steps_a_pass]

    def _made(self, number: int) -> list[list[Places]]:
        """The steps of a pass."""
        generator = np.random.default_rng([self._seed, number])
        orders = [generator.permutation(len(places)) for places in self._places]
        windows = -(-self.steps_a_pass // WINDOW)
        sizes = [len(part) for part in np.array_split(np.arange(self.steps_a_pass), windows)]
        ends = np.cumsum(sizes)[:-1] / self.steps_a_pass
        steps: list[list[Places]] = []
        cut = [np.split(order, np.round(ends * len(order)).astype(int)) for order in orders]
        for window, size in enumerate(sizes):
            tasks = []
            for own, places, lengths in zip(cut, self._places, self._lengths, strict=True):
                chosen = own[window][np.argsort(lengths[own[window]], kind="stable")]
                tasks.append([places[part] for part in np.array_split(chosen, size)])
            steps += [[parts[at] for parts in tasks] for at in generator.permutation(size)]
        return steps


def parted(units: Sequence[Places], part: int, parts: int) -> Iterator[tuple[int, Places]]:
    """A part of a step's examples: neighbours, so that a part has few tasks; parts are of nearly equal size.

    Yields:
        Number of a task, and its examples in this part; tasks without any are left out.
    """
    total = sum(map(len, units))
    first, last = total * part // parts, total * (part + 1) // parts
    start = 0
    for number, places in enumerate(units):
        own = places[max(0, first - start) : max(0, last - start)]
        if len(own):
            yield number, own
        start += len(places)


def lengths_of(task: Task, places: Places) -> Places:
    """Tokens of each example [N]; 1 for all where examples are no sequences."""
    lengths = np.ones(len(places), np.int64)
    if not len(places) or task.batch("train", places[:1]).mask is None:
        return lengths
    for first in range(0, len(places), CHUNK):
        mask = task.batch("train", places[first : first + CHUNK]).mask
        if mask is not None:
            lengths[first : first + CHUNK] = mask.sum(1).numpy()
    return lengths


def bucketed(lengths: Places, batch_size: int, generator: np.random.Generator) -> list[Places]:
    """Every example once, in random batches of similar length.

    Args:
        lengths: Tokens of each example [N].
        batch_size: Examples a batch; the last may have fewer.
        generator: Of the order.

    Returns:
        Positions of each batch's examples.
    """
    order = generator.permutation(len(lengths))
    batches: list[Places] = []
    for start in range(0, len(order), batch_size * WINDOW):
        bucket = order[start : start + batch_size * WINDOW]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def rate(step: int, steps: int, warm_up: float) -> float:
    """The share of the peak rate at a step: linear up, then linear down to 0."""
    rising = max(1, round(steps * warm_up))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))
