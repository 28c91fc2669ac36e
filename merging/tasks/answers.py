"""What generated texts are worth beside a reference: graded by name, or by the user's own function."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

Grade = Callable[[str, str], float]
"""(generated, reference) → a number, greater is better."""

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


GRADES: Mapping[str, Grade] = {"exact_match": exact_match, "contains": contains, "number": number}
"""Grades by the name of their metric."""


def extracted(pattern: "re.Pattern[str]", text: str) -> str:
    """The last match of a pattern: its first group, or all of it; nothing where it does not match."""
    matches = list(pattern.finditer(text))
    if not matches:
        return ""
    last = matches[-1]
    return (last.group(1) or "") if pattern.groups else last.group()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
