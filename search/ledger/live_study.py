"""A campaign's study for tools that read an Optuna storage: made of the ledger, and made anew whenever that has grown."""

import time
from collections.abc import Container

from optuna.storages import InMemoryStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from merging.errors import MergequestError
from merging.io import storage
from search.ledger.analysis import as_study
from search.ledger.frame import frame
from search.ledger.ledger import Ledger

EVERY = 2.0
"""Seconds between two looks at the ledger."""


class LedgerStorage(InMemoryStorage):
    """An Optuna storage with one study, which follows a ledger; what is written to it changes nothing and does not last.

    Args:
        path: The ledger's directory, local or at an address.
        name: The study's.
        every: Seconds between two looks.

    Raises:
        MergequestError: The ledger cannot be read.
    """

    def __init__(self, path: str, name: str, every: float = EVERY) -> None:
        super().__init__()
        self._path, self._name, self._every = path, name, every
        self._files, self._looked = self._listed(), time.monotonic()
        self._read()

    def get_all_studies(self) -> list[FrozenStudy]:
        """The study, with what the ledger has by now."""
        self._follow()
        return super().get_all_studies()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Its trials, in the order in which they ended."""
        self._follow()
        return super().get_all_trials(study_id, deepcopy, states)

    def _follow(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked < self._every:
                return
            self._looked = time.monotonic()
            try:
                if (files := self._listed()) != self._files:
                    self._read()
                    self._files = files
            except MergequestError:
                return  # whoever looks keeps what there was; the next look may find the storage again

    def _listed(self) -> dict[str, int]:
        return storage.list_files(self._path) if storage.exists(self._path) else {}

    def _read(self) -> None:
        made = as_study(frame(Ledger(self._path).rows()), every=True, name=self._name)._storage
        vars(self).update({name: value for name, value in vars(made).items() if name != "_lock"})
