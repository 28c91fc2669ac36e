"""Candidates in an inference engine instead of live modules."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.checkpoints.pool import Pool
from merging.errors import EngineError, EngineLostError
from merging.evaluation.engines.settings import EngineSettings
from merging.evaluation.engines.vllm_engine import VllmEngine, require_served, require_vllm
from merging.evaluation.live_models import CandidateModels, MakeSource, refuse_unmeasured, roundings
from merging.evaluation.shared_weights import sharing_model
from merging.mergers.dtypes import model_dtype
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.recipe import Recipe
from merging.tasks.harness.harness_task import HarnessTask
from merging.tasks.language.causal_lm import CausalLM
from merging.tasks.task import Task

PROBE = (3, 24)
"""Sequences and tokens that an engine is compared with transformers on."""
TOLERANCE = {torch.float32: 2e-3}
ROUNDED_TOLERANCE = 0.1
"""Nats a token, in the mean, that the two may differ by in 16 bits; weights of another candidate differ by ten times that."""


class EngineModels(CandidateModels):
    """Merges a recipe, hands it to one engine, and measures all tasks there.

    The engine proves itself: log-likelihoods of a probe are compared with those that transformers computes from the very same
    weights, at first random ones, then the first candidate's.

    Args:
        material: Pool and statistics.
        tasks: The tasks to evaluate, all of them `CausalLM` or `HarnessTask`.
        owners: Task → the member whose configuration it is evaluated with.
        device: Where merged weights lie before the engine takes them.
        settings: The engine's.
        source: Where merged weights come from.
        dtype: Of the engine; by default the checkpoints' own.

    Raises:
        EngineError: There is no such engine here, it does not serve the model, or it answers otherwise than transformers.
        PoolError: Some merged weight has no place in the model.
    """

    def __init__(
        self,
        material: Material,
        tasks: Sequence[Task],
        owners: Mapping[str, str],
        device: torch.device,
        settings: EngineSettings,
        source: MakeSource = ResidentMerger,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks, "float32")
        pool, self._dtype = material.pool, dtype or model_dtype(material.pool)
        longest = longest_sequence(tasks)
        self._out = {
            name: torch.empty(info.shape, dtype=self._dtype, device=device) for name, info in pool.weights.items()
        }
        first = tasks[0]
        self._reference: Any
        self._reference, self._shared = sharing_model(
            first, pool, pool.members[owners[first.name]], self._out, self._dtype
        )
        self._reference.to(device)
        refuse_unmeasured(tasks, {first.name: self._shared.dropped})
        self._rounded = roundings(self._out, pool)
        self._heads = _heads(self._reference, pool, self._out)
        config = {**pool.base.config, "architectures": [type(self._reference).__name__]}
        self._engine = VllmEngine(config, settings, self._dtype, max(longest, PROBE[1]) + 1, untied=bool(self._heads))
        generator = torch.Generator().manual_seed(0)
        for name, value in self._out.items():
            value.copy_(_noise(name, value, generator))
        try:
            self._take()
            self._prove("weights drawn by chance")
        except EngineLostError as error:  # another engine would die of the same model
            names = "/".join(config["architectures"])
            raise EngineError(f"vLLM cannot hold this {names}: {error}. Leave out `engine: vllm`") from error
        self._source = source(material, self._out)

    def _merge(self, recipe: Recipe) -> Mapping[str, float]:
        report = self._source.merge(recipe)
        for value, dtype in self._rounded:
            value.copy_(value.to(dtype))
        self._take()
        if self._reference is not None and self._prove("the first candidate"):
            self._reference = None
        return report

    @contextmanager
    def _lent(self, task: Task) -> Iterator[Any]:
        yield self._engine

    def _take(self) -> None:
        """Hands the merged weights to the engine, tied heads beside the weights that they are tied to."""
        heads = {head: self._out[name] for head, name in self._heads.items()}
        self._engine.load({**self._out, **heads}.items())

    def _prove(self, what: str) -> bool:
        """Compares the engine with transformers.

        Returns:
            Whether there was anything to compare: not where transformers itself gives no numbers.

        Raises:
            EngineError: They differ.
        """
        self._shared.refresh()
        size = self._reference.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, size, PROBE, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            logits = self._reference(input_ids=ids.to(self._reference.device), use_cache=False).logits[:, :-1].float()
        wanted = logits.log_softmax(-1).cpu().gather(-1, ids[:, 1:, None])[..., 0].numpy()
        if not np.isfinite(wanted).all():
            return False
        answers = np.stack(self._engine.log_likelihoods(ids.tolist()))
        differences = np.nan_to_num(np.abs(answers - wanted), nan=np.inf)
        bound = TOLERANCE.get(self._dtype, ROUNDED_TOLERANCE)
        if differences.mean() > bound:
            row, place = np.unravel_index(differences.argmax(), differences.shape)
            raise EngineError(
                f"the engine answers otherwise than transformers, from {what}: log-likelihoods differ by "
                f"{differences.mean():.3g} nats a token in the mean "
                f"(at most {bound:g} is rounding), most at token {place + 1} of probe {row}: "
                f"{answers[row, place]:.4f} instead of {wanted[row, place]:.4f}. Leave out `engine: vllm` for this model"
            )
        return True


def check_engine(pool: Pool, tasks: Sequence[Task], owners: Mapping[str, str], settings: EngineSettings) -> None:
    """Looks, before any work, whether an engine can hold a pool's merges and answer the tasks.

    Args:
        pool: Base and members.
        tasks: What it is to answer.
        owners: Task → the member whose head it uses.
        settings: The campaign's of its engine.

    Raises:
        EngineError: vLLM is not installed or does not serve the model, its attention heads cannot be shared out over the
            engine's processes, a task is none that it answers, or weights are kept per task.
    """
    longest_sequence(tasks)
    for task in tasks:
        if kept := pool.members[owners[task.name]].head:
            raise EngineError(
                f"`engine: vllm` holds one model for all tasks, and '{min(kept)}' is kept for each: leave out `heads`, or the "
                "engine"
            )
    config = pool.base.config
    heads, processes = (config.get("text_config") or config).get("num_attention_heads") or 0, settings.tensor_parallel
    if heads % processes:
        fits = [count for count in range(1, heads + 1) if not heads % count]
        raise EngineError(
            f"engine.tensor_parallel: {processes} processes cannot share the {heads} attention heads of {pool.base.path}: "
            f"use {' or '.join(map(str, fits))}"
        )
    require_vllm(config)


def longest_sequence(tasks: Sequence[Task]) -> int:
    """Tokens of the longest sequence of all tasks, if an engine can answer them.

    Raises:
        EngineError: One is of another kind, or generates as no engine does.
        TaskError: Some request of the harness cannot be made.
    """
    longest = 0
    for task in tasks:
        if not isinstance(task, CausalLM | HarnessTask):
            raise EngineError(
                f"`engine: vllm` holds causal language models, and task '{task.name}' is of kind '{task.kind}': leave it out"
            )
        needs = task.engine_needs()
        for generation in needs.generations:
            require_served(generation)
        longest = max(longest, needs.longest)
    return longest


def _heads(model: Any, pool: Pool, out: Mapping[str, Tensor]) -> dict[str, str]:
    """Where output head and embedding are one weight: the name of it that the pool does not have → the one that it has."""
    head = model.get_output_embeddings()
    if head is None or head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr():
        return {}
    place = head.weight.data_ptr()
    stored = next(name for name in pool.weights if out[name].data_ptr() == place)
    names = [name for name, value in model.named_parameters(remove_duplicate=False) if value.data_ptr() == place]
    return {name: stored for name in names if name != stored and not name.endswith(f".{stored}")}


def _noise(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Weights with which a model gives likelihoods that tell tokens apart."""
    noise: Tensor = torch.randn(like.shape, generator=generator)
    if like.ndim < 2:
        return 0.1 * noise + float(not name.endswith("bias"))
    scaled: Tensor = noise / like.shape[-1] ** 0.5
    return scaled
