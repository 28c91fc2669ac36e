"""What models said of single test examples: kept beside the ledger, for two models are compared example by example."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from merging.checkpoints.formats.safetensors_file import read_arrays
from merging.evaluation.steps import EvaluationPlan
from merging.io import addresses, atomic, storage
from search.candidate import Candidate, Outcome

Values: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""Task → one number an example [N], whose mean is the score; tasks whose metric is no such mean are not there."""


class KeptOutcomes:
    """A planner that measures everything at once and keeps what each model said of every example.

    A model's file is written before its row, so that no row goes without.

    Args:
        path: Directory of one safetensors file per candidate, local or at any fsspec address.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """See `Planner.plan`."""
        return EvaluationPlan()

    def learn(self, outcome: Outcome) -> Outcome:
        """Keeps an outcome's values; see `Planner.learn`."""
        measurement = outcome.measurement
        if measurement is not None and measurement.trace is not None:
            values = {
                task: np.ascontiguousarray(own, np.float32)
                for task, own in measurement.trace.values.items()
                if measurement.scores[task].is_mean
            }
            atomic.write_bytes(self._file(outcome.candidate.recipe.identity), save(values))
        return outcome

    def read(self, candidate: str) -> Values:
        """A candidate's values; empty where none were kept."""
        path = self._file(candidate)
        return read_arrays(path) if storage.exists(path) else {}

    def _file(self, candidate: str) -> str:
        return addresses.join(self._path, f"{candidate}.safetensors")
