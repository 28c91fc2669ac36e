"""Entities in tag sequences: spans by the BIO scheme, and F1 over them as conlleval and seqeval count it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merging.tasks.metrics.metric import draws, ratio
from merging.tasks.predictions import Floats


@dataclass(frozen=True)
class SpanCounts:
    """What is counted of each example's entities.

    Args:
        right: Predicted with the same start, end and type [N].
        predicted: [N].
        true: [N].
    """

    right: Floats
    predicted: Floats
    true: Floats


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, start and end (inclusive) of each entity: B starts one, I goes on with one of its type and else starts one.

    E, L end and S, U are single where the scheme has them. A tag without a prefix is an entity of one word, `O` is none.
    """
    spans: set[tuple[str, int, int]] = set()
    kind, start = "", -1
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag[1:2] == "-" else ("O" if tag == "O" else "S", "", tag)
        starts = prefix in ("B", "S", "U") or (prefix in ("I", "E", "L") and name != kind)
        if kind and (prefix == "O" or starts):
            spans.add((kind, start, place - 1))
            kind = ""
        if starts:
            kind, start = name, place
        if kind and prefix in ("E", "L", "S", "U"):
            spans.add((kind, start, place))
            kind = ""
    return spans


def count(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> SpanCounts:
    """Entities of each example, by tags."""
    pairs = [(entities(own), entities(other)) for own, other in zip(true, predicted, strict=True)]
    right, guessed, wanted = zip(*((len(own & other), len(other), len(own)) for own, other in pairs), strict=True)
    return SpanCounts(*(np.array(numbers, np.float64) for numbers in (right, guessed, wanted)))


def f1(counts: SpanCounts, seed: int = 0) -> tuple[float, float]:
    """Micro F1 over all entities, and its spread over resampled examples (Efron 1979); 0 where there are none."""

    def value(weights: Floats) -> Floats:
        return ratio(2 * weights @ counts.right, weights @ (counts.predicted + counts.true))

    once = np.ones(len(counts.true))
    return float(value(once[None])[0]), float(value(draws(once, seed)).std(ddof=1))
