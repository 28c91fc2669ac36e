"""What an evaluator takes of memory, by what the regime has it hold."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch

from merging.checkpoints.pool import Pool
from merging.evaluation.engines import EngineSettings
from merging.mergers.dtypes import merged_bytes, model_dtype
from merging.mergers.material import Material
from merging.mergers.shard_planning import place
from merging.methods import METHODS

PROCESS_BYTES = 1 << 30
"""Of Python, torch and transformers, with some examples and their activations."""


@dataclass(frozen=True)
class EvaluatorMemory:
    """An evaluator's memory in bytes.

    Args:
        parameters: Merged weights' entries.
        models: The live models: merged weights once, and every task's own head; and, while they are built, one more model.
        pool: Base, members and statistics as they are stored, and what methods prepare of them; 0 where shards hold these.
        waiting: Candidates' weights that wait for their turn.
        engine: An inference engine's own weights, and its cache.
    """

    parameters: int
    models: int
    pool: int
    waiting: int
    engine: int = 0

    @property
    def total(self) -> int:
        """All of it, with the process."""
        return PROCESS_BYTES + self.models + self.pool + self.waiting + self.engine

    def on_a_device(self, devices: int) -> int:
        """What of it lies on the fullest of so many GPUs: models are built in main memory, and candidates wait there.

        Layers are spread evenly, as an engine's weights are. What an engine is given is merged on the first of its GPUs; where
        shards hold the pool, it comes into main memory.
        """
        merged = self.models // 2 + self.pool
        if not self.engine:
            return ceil(merged / devices)
        return ceil(self.engine / devices) + (merged if self.pool else 0)


def resident_memory(
    material: Material,
    methods: Sequence[str],
    owners: Collection[str],
    dtype: torch.dtype | None = None,
    *,
    on_gpu: bool = False,
    engine: EngineSettings | None = None,
) -> EvaluatorMemory:
    """Of an evaluator that merges by itself.

    Args:
        material: Pool and statistics; only headers are read.
        methods: Names of the methods that will be asked for.
        owners: The members whose heads tasks are evaluated with, one per task.
        dtype: Of the models; None for the checkpoints' own.
        on_gpu: Whether all lies on a GPU, where each method that prepares nothing has base and members by itself: in main
            memory they are mapped from their files once.
        engine: What holds candidates; None for live models.
    """
    pool = material.pool
    (everything,) = place(material, methods, 1)
    held = everything.held_bytes - everything.merged_bytes
    if on_gpu:
        copies = sum(not METHODS[method].requires for method in methods)
        held += max(copies - 1, 0) * place(Material(pool), (), 1)[0].read_bytes
    return EvaluatorMemory(_parameters(pool), _models(pool, owners, dtype), held, 0, _engine(pool, engine, dtype))


def fed_memory(
    pool: Pool,
    owners: Collection[str],
    candidates: int,
    dtype: torch.dtype | None = None,
    *,
    engine: EngineSettings | None = None,
) -> EvaluatorMemory:
    """Of an evaluator that shards feed.

    Args:
        pool: The pool; only headers are read.
        owners: The members whose heads tasks are evaluated with, one per task.
        candidates: How many candidates' weights wait in its memory.
        dtype: Of the models; None for the checkpoints' own.
        engine: What holds candidates; None for live models.
    """
    waiting = candidates * merged_bytes(pool.weights, list(pool.weights))
    return EvaluatorMemory(_parameters(pool), _models(pool, owners, dtype), 0, waiting, _engine(pool, engine, dtype))


def _engine(pool: Pool, engine: EngineSettings | None, dtype: torch.dtype | None) -> int:
    if engine is None or engine.kind == "transformers":
        return 0
    weights = (dtype or model_dtype(pool)).itemsize * _parameters(pool)
    return weights + int(engine.tensor_parallel * (engine.cache * 1e9 + PROCESS_BYTES))


def _parameters(pool: Pool) -> int:
    return sum(prod(info.shape) for info in pool.weights.values())


def _models(pool: Pool, owners: Collection[str], dtype: torch.dtype | None) -> int:
    size = (dtype or model_dtype(pool)).itemsize
    own = [pool.members[owner] for owner in owners]
    heads = sum(prod(member.checkpoint.tensors[name].shape) for member in own for name in member.head)
    return size * (2 * _parameters(pool) + heads)
