"""Results that are kept for the candidates that come next, and dropped once others are asked for."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Results for the latest key: those of the key before are dropped before new ones take memory."""

    def __init__(self) -> None:
        self._key: object = None
        self._kept: dict[Hashable, T] = {}

    def get(self, key: object, compute: Callable[[], T], place: Hashable = None) -> T:
        """The result for a key, computed where it is not kept.

        Args:
            key: All that results depend on besides their place; compared by equality.
            compute: Gives the result.
            place: Which of a key's results (a weight's, a member's).
        """
        if key != self._key:
            self._kept.clear()
            self._key = key
        if place not in self._kept:
            self._kept[place] = compute()
        return self._kept[place]
