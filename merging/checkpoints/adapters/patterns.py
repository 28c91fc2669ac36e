"""Regular expressions that somebody wrote, in an adapter's configuration or a campaign: tried for a bounded time."""

from functools import cache

import regex

from merging.errors import CheckpointError

MAX_LENGTH = 2000
"""Characters of a pattern; they also take time to compile."""
SECONDS = 0.5
"""For one match. A pattern that backtracks without end would take years."""


def matches(pattern: str, text: str) -> bool:
    """Whether a regular expression matches at the beginning of a text, as `re.match` finds.

    Raises:
        CheckpointError: It is no regular expression, too long, or takes too long.
    """
    shown = repr(pattern[:200])
    try:
        return compiled(pattern).match(text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise CheckpointError(f"the pattern {shown} backtracks without end on '{text}': simplify it") from error


def last_match(pattern: str, text: str) -> "regex.Match[str] | None":
    """The last match of a regular expression in a text.

    Raises:
        CheckpointError: It is no regular expression, too long, or takes too long.
    """
    last = None
    try:
        for match in compiled(pattern).finditer(text, timeout=SECONDS):
            last = match
    except TimeoutError as error:
        raise CheckpointError(
            f"the pattern {pattern[:200]!r} backtracks without end on {text[:200]!r}: simplify it"
        ) from error
    return last


@cache
def compiled(pattern: str) -> "regex.Pattern[str]":
    """A regular expression.

    Raises:
        CheckpointError: It is none, or too long.
    """
    shown = repr(pattern[:200])
    if len(pattern) > MAX_LENGTH:
        raise CheckpointError(f"the pattern {shown} … has {len(pattern):,} characters, more than {MAX_LENGTH:,}")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise CheckpointError(f"the pattern {shown} is no regular expression: {error}") from error
