"""What may be said to a search while it runs."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from merging.errors import MergequestError

if TYPE_CHECKING:
    from merging.recipe import Recipe


class StoppedError(MergequestError):
    """Somebody asked for the end: what was in flight is in the ledger, and a resume goes on."""


class Steering:
    """Asked between candidates; this one says nothing."""

    def stopping(self) -> bool:
        """Whether to end once what is in flight has been measured."""
        return False

    def queued(self) -> "Iterable[Recipe]":
        """Recipes to measure before the sampler's next proposal, each once."""
        return ()

    def stop_here(self) -> None:
        """Ends where nothing is in flight.

        Raises:
            StoppedError: If it is to end.
        """
        if self.stopping():
            raise StoppedError("stopped as asked: `mergequest resume` goes on from here")
