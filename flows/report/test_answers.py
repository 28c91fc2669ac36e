"""What models said of single examples: kept beside the ledger, for two models are compared example by example."""

import numpy as np
from safetensors.numpy import save

from merging.checkpoints.formats.safetensors_file import read_arrays
from merging.evaluation.steps import EvaluationPlan
from merging.io import addresses, atomic, storage
from merging.tasks.task import SPLITS
from search.candidate import Candidate, Outcome, Planner
from search.resolution import Values as Values


class KeptPredictions:
    """A planner that keeps what each model said of every example, where it is measured on all.

    A model's file is written before its row, so that no row goes without.

    Args:
        path: Directory of one safetensors file per candidate, local or at any fsspec address.
        inner: Says how candidates are measured; by default everything at once.
    """

    def __init__(self, path: str, inner: Planner | None = None) -> None:
        self._path, self._inner = path, inner

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """See `Planner.plan`."""
        return (self._inner.plan(candidate) if self._inner else None) or EvaluationPlan()

    def learn(self, outcome: Outcome) -> Outcome:
        """Keeps an outcome's values; see `Planner.learn`."""
        outcome = self._inner.learn(outcome) if self._inner else outcome
        measurement, split = outcome.measurement, outcome.candidate.split
        whole = measurement is not None and not measurement.pruned and split in SPLITS
        if measurement is not None and whole and measurement.trace is not None:
            values = {task: np.ascontiguousarray(own, np.float32) for task, own in measurement.trace.influences.items()}
            atomic.write_bytes(self._file(outcome.candidate.recipe.identity), save(values))
        return outcome

    def read(self, candidate: str) -> Values:
        """A candidate's values; empty where none were kept."""
        path = self._file(candidate)
        return read_arrays(path) if storage.exists(path) else {}

    def _file(self, candidate: str) -> str:
        return addresses.join(self._path, f"{candidate}.safetensors")
