"""Errors of machines among a pool's answers: where a candidate met them, who is sound, and when nobody is."""

from collections.abc import Sequence, Set
from typing import Any

from merging.errors import ClusterError

FAULTS = 2
"""After so many errors about machines, on different evaluators, a candidate has failed with the last of them."""
UNEXPLAINED = 3
"""So many candidates in a row that failed like that, with no sound answer in between, tell of all machines."""


class FaultRecord:
    """What a pool's evaluators have shown of their machines."""

    def __init__(self) -> None:
        self._nodes: dict[str, list[str]] = {}
        self._sound: set[Any] = set()
        self._unexplained = 0
        self.last_error = ""
        """The first line of the latest error."""

    @property
    def sound(self) -> Set[Any]:
        """Evaluators that have given an answer which is no error of their machine."""
        return self._sound

    def nodes(self, ticket: str) -> Sequence[str] | None:
        """Nodes on which an assignment met such an error; None where it met none."""
        return self._nodes.get(ticket)

    def add(self, ticket: str, node: str, error: str) -> bool:
        """Notes an error of a machine.

        Returns:
            Whether the assignment has failed with it; else another evaluator may try.

        Raises:
            ClusterError: Candidate after candidate fails like that.
        """
        nodes = self._nodes.setdefault(ticket, [])
        nodes.append(node)
        self.last_error = error.partition("\n")[0]
        if len(nodes) < FAULTS:
            return False
        self._unexplained += 1
        if self._unexplained >= UNEXPLAINED:
            raise ClusterError(
                f"{self._unexplained} candidates in a row failed with errors of the machine, each on {FAULTS} evaluators, the "
                f"last one with {error}\nMend the cause and resume with --retry-failed: what was measured is kept"
            )
        return True

    def answered(self, ticket: str, evaluator: Any) -> set[str]:
        """Notes an answer that is no error of the machine.

        Returns:
            The nodes where the assignment had met one: it was theirs, and not the recipe's.
        """
        self._sound.add(evaluator)
        self._unexplained = 0
        return set(self._nodes.pop(ticket, ()))

    def forget_evaluator(self, evaluator: Any) -> None:
        """Notes that an evaluator is gone."""
        self._sound.discard(evaluator)

    def forget_assignment(self, ticket: str) -> None:
        """Notes that an assignment has come to its end."""
        self._nodes.pop(ticket, None)

    def clear(self) -> None:
        """Forgets evaluators and assignments."""
        self._sound.clear()
        self._nodes.clear()
