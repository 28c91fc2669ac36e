"""Evaluators that merge nothing themselves: shards send them the weights of every candidate."""

import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from merging.mergers.dtypes import views
from merging.mergers.material import Material
from merging.mergers.resident import joined
from merging.recipe import Recipe
from ray_tasks.evaluators.evaluator import Answer, Assignment, Evaluator, failed
from ray_tasks.sharded.nixl_transfer import Address, ReceiveBuffers
from ray_tasks.sharded.shards import ShardResult


class Delivery:
    """A source of weights that were merged elsewhere.

    Args:
        material: For the weights' shapes; none is read.
        out: The weights to overwrite, on the evaluator's device.
        buffers: Where shards write what they merged, if they do.
    """

    def __init__(self, material: Material, out: Mapping[str, Tensor], buffers: ReceiveBuffers | None = None) -> None:
        self._out = out
        self._buffers = buffers
        self._weights = material.pool.weights
        self._results: Sequence[ShardResult] = ()

    def take(self, results: Sequence[ShardResult]) -> None:
        """Keeps what is to be copied."""
        self._results = results

    def merge(self, recipe: Recipe) -> dict[str, float]:
        """Copies the results that were taken, which are the recipe's, and lets go of them.

        Returns:
            The method's figures on the merge.
        """
        results, self._results = self._results, ()
        for number, result in enumerate(results):
            for name, value in views(self._values(number, result), self._weights, result.names).items():
                self._out[name].copy_(value)
        return joined(result.report for result in results)

    def _values(self, number: int, result: ShardResult) -> Tensor:
        if result.turn is not None:
            assert self._buffers is not None
            return self._buffers.part(number, result.turn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the store's memory is read-only; it is only read
            return torch.from_numpy(result.values)


class FedEvaluator(Evaluator):
    """An evaluator that is fed by shards: `load` brings the weights that the next `measure` is about.

    What was loaded is let go of when it is measured, so that no more than one candidate's weights wait beside those in the
    models.
    """

    def __init__(self, setup: Any, threads: int) -> None:
        super().__init__(setup, threads)
        self._delivery: Delivery | None = None
        self._loaded: tuple[str, Sequence[ShardResult]] | None = None
        self._buffers: ReceiveBuffers | None = None
        self._source = self._deliver

    def build(self) -> str:
        """As every evaluator; also makes room for what shards write.

        Raises:
            ClusterError: Nothing can be written here.
        """
        if self._setup.parts and self._buffers is None:
            self._buffers = ReceiveBuffers(self._setup.parts)
        return super().build()

    def address(self) -> Address:
        """Where shards write to, once this is built."""
        assert self._buffers is not None
        return self._buffers.address

    def load(self, identity: str, *results: ShardResult) -> None:
        """Takes the results of the recipe that is measured next."""
        self._loaded = identity, results

    def measure(self, assignment: Assignment) -> Answer:
        """Copies the results and evaluates; results that did not come are a loss, for which nobody here is to blame."""
        loaded, self._loaded = self._loaded, None
        now = datetime.now(UTC)
        if loaded is None or loaded[0] != assignment.recipe.identity:
            return Answer(None, "a shard was lost before its part of the merge arrived", self._worker, now, lost=True)
        if wrong := sorted((result for result in loaded[1] if result.error), key=lambda result: result.lost):
            unreachable = any(result.unreachable for result in wrong)
            lost = wrong[0].lost or unreachable
            return Answer(None, wrong[0].error, self._worker, now, lost=lost, unreachable=unreachable)
        try:
            self.build()
        except Exception as error:
            return failed(error, self._worker, now)
        assert self._delivery is not None
        self._delivery.take(loaded[1])
        try:
            return super().measure(assignment)
        finally:
            self._delivery.take(())  # of a candidate whose scores were known, nothing was copied

    def _deliver(self, material: Material, out: Mapping[str, Tensor]) -> Delivery:
        self._delivery = Delivery(material, out, self._buffers)
        return self._delivery
