"""Shard actors: each keeps a part of the pool, and merges that part of one recipe after another.

A recipe's merge is a handful of calls that are sent off together, and that Ray lines up by what they wait for: while an
evaluator measures a candidate, the shards merge its next one, and the result travels: through Ray's object store, or
written straight into the evaluator's memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from merging.mergers.material import Material
from merging.mergers.shard import SECOND_PASSES, ShardMerger, needs_global_pass, needs_second_pass
from merging.mergers.shard_planning import ShardContent
from merging.recipe import Recipe, Value
from ray_tasks.cluster_errors import surfaced
from ray_tasks.sharded.nixl_transfer import Address, UnreachableError, Writer


@dataclass(frozen=True)
class ShardReply:
    """What a shard says to all shards: failures are values, so that they are not mistaken for a dead shard.

    Args:
        value: A method's own.
        error: Type and message of what went wrong.
    """

    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class ShardResult:
    """A shard's part of a merge.

    Args:
        names: The base's names of its weights.
        values: The weights as `merging.mergers.dtypes.views` lays them; in an evaluator, a view of the object store. Empty
            where they were written to the evaluator.
        report: The method's figures on this part.
        error: Type and message of what went wrong.
        lost: Whether that is nobody's fault, so that trying again may help.
        turn: The turn in which the weights were written to the evaluator, where they were.
        unreachable: Whether the evaluator cannot be written to any more.
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.uint8]
    report: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    lost: bool = False
    turn: int | None = None
    unreachable: bool = False


class Receiver:
    """An evaluator that shards write to, as the driver knows it.

    Args:
        address: A reference to its address.
    """

    def __init__(self, address: Any) -> None:
        self.address = address
        self._turns = count()

    def turn(self) -> int:
        """The next turn."""
        return next(self._turns)


class Shard:
    """The actor's inside: one process, in the memory of its node.

    Args:
        material: Opens pool and statistics.
        names: The base's names of its weights.
        threads: Torch threads.
        number: Which of the shards this is.
    """

    def __init__(self, material: Callable[[], Material], names: tuple[str, ...], threads: int, number: int = 0) -> None:
        torch.set_num_threads(threads)
        self._open = material
        self._names = names
        self._number = number
        self._writer: Writer | None = None
        self._opened: ShardMerger | None = None
        self._global_stats: dict[str, ShardReply] = {}
        self._failed: dict[str, str] = {}

    def read(self) -> None:
        """Reads base and members; raises what is wrong with them."""
        self._merger.read()

    def global_pass(self, method: str) -> ShardReply:
        """A method's global statistics of this shard's weights; made once."""
        if method not in self._global_stats:
            self._global_stats[method] = self._reply(lambda: self._merger.global_pass(method))
        return self._global_stats[method]

    def settle(self, method: str, *replies: ShardReply) -> None:
        """Takes all shards' global statistics."""
        self._failed.pop(method, None)
        if errors := [reply.error for reply in replies if reply.error]:
            self._failed[method] = errors[0]
        elif not self._merger.knows(method):
            self._merger.settle(method, [reply.value for reply in replies])

    def second_pass(self, recipe: Recipe, *more: ShardReply) -> ShardReply:
        """What a recipe asks of this shard's weights beside the global statistics, and what all shards answered before."""
        if recipe.method in self._failed or not self._merger.knows(recipe.method) or any(reply.error for reply in more):
            return ShardReply()  # the merge says why
        return self._reply(lambda: self._merger.second_pass(recipe, [answer.value for answer in more]))

    def merge(self, recipe: Recipe, address: Address | None, turn: int, *more: ShardReply) -> ShardResult:
        """This shard's part of a recipe's merge; written to the evaluator of an address, if there is one."""
        nothing = np.empty(0, dtype=np.uint8)
        errors = [self._failed.get(recipe.method), *(reply.error for reply in more)]
        if error := next((error for error in errors if error), None):
            return ShardResult(self._names, nothing, error=error)
        if not self._merger.knows(recipe.method):
            return ShardResult(self._names, nothing, error="a shard was started again", lost=True)
        reply = self._reply(lambda: self._merger.merge_part(recipe, [answer.value for answer in more]))
        if reply.error:
            return ShardResult(self._names, nothing, error=reply.error)
        if address is None:
            return ShardResult(self._names, self._merger.values.numpy(), reply.value)
        try:
            if self._writer is None:
                self._writer = Writer(self._merger.values, self._number)
            self._writer.write(address, turn)
        except UnreachableError as error:
            why = f"a shard cannot write to this evaluator: {error}"
            return ShardResult(self._names, nothing, error=why, lost=True, unreachable=True)
        except Exception as error:
            return ShardResult(self._names, nothing, error=f"{type(error).__name__}: {error}", lost=True)
        return ShardResult(self._names, nothing, reply.value, turn=turn)

    @property
    def _merger(self) -> ShardMerger:
        """Built when it is first asked for: a shard that is started again reads its part again."""
        if self._opened is None:
            merger = ShardMerger(self._open(), self._names)
            merger.read()
            self._opened = merger
        return self._opened

    def _reply(self, work: Callable[[], Any]) -> ShardReply:
        try:
            return ShardReply(work())
        except Exception as error:
            return ShardReply(error=f"{type(error).__name__}: {error}")


class Shards:
    """All shards of a pool.

    Args:
        material: Opens pool and statistics on any node; small, for it travels.
        places: What lies in each.
        group: A placement group with one bundle of memory for each, in this order.
        threads: Torch threads of each.
        retries: How often a call is made again whose shard died over it, until it fails. A shard itself is started again
            however often: over days, preemptible nodes take it along more often than any bound that would catch a crash.
        direct: Whether merged weights are written straight into evaluators' memory.
    """

    def __init__(
        self,
        material: Callable[[], Material],
        places: Sequence[ShardContent],
        group: Any,
        threads: int,
        retries: int,
        direct: bool = False,
    ) -> None:
        self._group = group
        self.parts = tuple(place.merged_bytes for place in places) if direct else ()
        """Bytes of each shard's part, for the evaluators that these are written to; empty otherwise."""
        self._settled: set[str] = set()
        self._refined_for: dict[str, tuple[Mapping[str, Value], list[Any]]] = {}
        self.actors = [
            # no CPUs: merges take turns with evaluation on nodes without a GPU, and idle elsewhere
            ray.remote(Shard)
            .options(
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=max(retries, 1),  # with none, calls would not wait for a shard that is being started
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            )
            .remote(material, place.names, threads, number)
            for number, place in enumerate(places)
        ]

    def read(self) -> None:
        """Waits until every shard has read its part.

        Raises:
            MergequestError: A shard's own error.
            ClusterError: A shard died again and again while it read.
        """
        with surfaced("reading the pool into shards"):
            ray.get([actor.read.remote() for actor in self.actors])

    def nodes(self) -> list[str]:
        """The node that each shard has its place on, as Ray names it; one that is lost until there is another place."""
        bundles = placement_group_table(self._group)["bundles_to_node_id"]
        return [bundles[number] for number in range(len(self.actors))]

    def merge(self, recipe: Recipe, receiver: Receiver | None = None) -> list[Any]:
        """Sends off a recipe's merge and returns at once: references to each shard's result.

        Args:
            recipe: What to merge.
            receiver: The evaluator that the weights are written to; without one, the results hold them.
        """
        actors, method = self.actors, recipe.method
        if needs_global_pass(method) and method not in self._settled:
            replies = [actor.global_pass.remote(method) for actor in actors]
            for actor in actors:
                actor.settle.remote(method, *replies)
            self._settled.add(method)
        if needs_second_pass(method) and self._refined_for.get(method, (None, []))[0] != recipe.parameters:
            answers: list[Any] = []
            for _ in range(SECOND_PASSES):
                answers += [actor.second_pass.remote(recipe, *answers) for actor in actors]
            self._refined_for[method] = recipe.parameters, answers
        _, more = self._refined_for.get(method, (None, []))
        address, turn = (None, 0) if receiver is None else (receiver.address, receiver.turn())
        return [actor.merge.remote(recipe, address, turn, *more) for actor in actors]

    def forget(self) -> None:
        """After a loss: a shard that was started again must be told what it knew."""
        self._settled.clear()
        self._refined_for.clear()

    def close(self) -> None:
        """Ends the shards and gives their memory back."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors.clear()
        remove_placement_group(self._group)
