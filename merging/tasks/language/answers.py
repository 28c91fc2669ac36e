"""What generated texts are worth beside a reference: graded by name, or by the user's own function."""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from merging.checkpoints.adapters.patterns import last_match
from merging.errors import CheckpointError, TaskError

Grade = Callable[[str, str], float]
"""(generated, reference) → a number, greater is better."""

RESAMPLES = 50
"""Of the bootstrap of metrics of all texts together, each of which costs a pass over them."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(generated: str, reference: str) -> float:
    """1 where both agree but for case and blanks."""
    return float(_plain(generated) == _plain(reference))


def contains(generated: str, reference: str) -> float:
    """1 where the reference stands in what was generated, but for case and blanks."""
    return float(_plain(reference) in _plain(generated))


def number(generated: str, reference: str) -> float:
    """1 where the last number of both is the same."""
    own, wanted = _last_number(generated), _last_number(reference)
    return float(own is not None and own == wanted)


def rouge_l(generated: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004), lower case, letters and digits alone."""
    own, wanted = (re.findall(r"[^\W_]+", text.casefold()) for text in (generated, reference))
    row = [0] * (len(wanted) + 1)
    for word in own:
        before = row
        row = [0]
        for place, other in enumerate(wanted, start=1):
            row.append(before[place - 1] + 1 if word == other else max(before[place], row[-1]))
    return 2 * row[-1] / (len(own) + len(wanted)) if own and wanted else 0.0


GRADES: Mapping[str, Grade] = {"exact_match": exact_match, "contains": contains, "number": number, "rouge_l": rouge_l}
"""Grades by the name of their metric."""


def corpus_score(metric: str, generated: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """ChrF or BLEU of all texts together as sacrebleu computes them, from 0 to 1, and a bootstrap's standard error.

    Raises:
        TaskError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise TaskError(f"metric '{metric}' is sacrebleu's: pip install 'mergequest[text]'") from error
    kind: Any = getattr(sacrebleu, metric.upper())()
    value = float(kind.corpus_score(list(generated), [list(references)]).score) / 100
    rng, size = np.random.default_rng(0), len(generated)
    draws = []
    for _ in range(RESAMPLES):
        places = rng.integers(size, size=size)
        drawn = [generated[place] for place in places], [[references[place] for place in places]]
        draws.append(float(kind.corpus_score(*drawn).score) / 100)
    return value, float(np.std(draws, ddof=1))


def extracted(pattern: str, text: str) -> str:
    """The last match of a pattern: its first group, or all of it; nothing where it does not match.

    Raises:
        TaskError: It is no regular expression, or takes too long.
    """
    try:
        last = last_match(pattern, text)
    except CheckpointError as error:
        raise TaskError(f"`extract`: {error}") from error
    if last is None:
        return ""
    return str((last.group(1) or "") if last.re.groups else last.group())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None
