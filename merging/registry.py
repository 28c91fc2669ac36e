"""One kind of registry for methods, statistics, tasks, metrics and samplers: a name, and what it stands for."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

from merging.errors import MergequestError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str]) -> str:
    """A sentence that names the nearest known word, or all of them."""
    near = get_close_matches(name[:100], known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(sorted(known))}."


class Registry(Generic[T]):
    """Names and what they stand for.

    Args:
        what: The kind of thing registered, for error messages ("method").
        error: The error raised for an unknown name.
    """

    def __init__(self, what: str, error: type[MergequestError]) -> None:
        self._what = what
        self._error = error
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Adds `entry`; a name is taken once.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self._what} '{name}' is already registered")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise self._error(f"unknown {self._what} '{name}'. {did_you_mean(name, list(self._entries))}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
