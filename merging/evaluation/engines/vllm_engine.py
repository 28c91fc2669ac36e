"""A vLLM engine in this process that takes weights in memory."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.errors import EngineError, EngineLostError
from merging.evaluation.engines.settings import EngineSettings
from merging.tasks.language.text_engine import Greedy, TextEngine
from merging.tasks.predictions import Floats

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that weights are handed over, not copied
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every evaluator of a machine takes the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
WORKER = "merging.evaluation.engines.vllm_worker.BucketLoader"
UNSERVED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "guidance_scale": 1,
    "dola_layers": None,
    "encoder_repetition_penalty": 1,
    "watermarking_config": None,
    "max_time": None,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
}
"""Settings of transformers' generation that change what is likeliest and that the engine has no word for, and what turns them
off."""


def require_vllm(config: Mapping[str, Any]) -> None:
    """Looks whether there is a vLLM here that serves a model.

    Args:
        config: The checkpoint's `config.json`.

    Raises:
        EngineError: There is none, or it does not.
    """
    if find_spec("vllm") is None:
        raise EngineError(
            "`engine: vllm`, and vLLM is not installed here: pip install 'mergequest[vllm]' on machines with GPUs; on a CPU "
            "`make vllm-env`, and run .vllm/bin/mergequest"
        )
    os.environ.update({**ENVIRONMENT, **os.environ})
    from vllm import ModelRegistry

    names = list(config.get("architectures") or ())
    if not set(names) & set(ModelRegistry.get_supported_archs()):
        raise EngineError(
            f"vLLM serves no {' or '.join(names) or 'model whose config.json has no `architectures`'}: leave out `engine: vllm`"
        )


class VllmEngine(TextEngine):
    """One vLLM engine, started with weights that mean nothing.

    Args:
        config: The model's `config.json`.
        settings: The campaign's.
        dtype: Of weights and computation.
        tokens: Tokens of the longest sequence, prompt and completion.
        untied: Whether the output head is to be a weight of its own, though the configuration ties it to the embedding. vLLM's
            CPU backend packs a copy of a tied head, which later weights do not reach.

    Raises:
        EngineError: vLLM is not installed, or cannot start with this model.
    """

    def __init__(
        self, config: Mapping[str, Any], settings: EngineSettings, dtype: torch.dtype, tokens: int, *, untied: bool
    ) -> None:
        require_vllm(config)
        from vllm import LLM

        self._bucket = settings.bucket * 1_000_000
        self._directory = tempfile.TemporaryDirectory(prefix="mergequest-engine-")
        (Path(self._directory.name) / "config.json").write_text(json.dumps(dict(config)))
        _bear_wrappers()
        try:
            self._llm: Any = LLM(
                model=self._directory.name,
                dtype=str(dtype).removeprefix("torch."),
                load_format="dummy",
                skip_tokenizer_init=True,
                enforce_eager=not torch.cuda.is_available(),
                max_model_len=tokens,
                tensor_parallel_size=settings.tensor_parallel,
                kv_cache_memory_bytes=int(settings.cache * 1e9),
                gpu_memory_utilization=0.01,  # without effect on the cache, but more than is free would be an error
                worker_extension_cls=WORKER,
                hf_overrides={"tie_word_embeddings": False} if untied else {},
                disable_log_stats=True,
            )
        except (Exception, SystemExit) as error:  # whatever vLLM and its workers raise
            raise EngineError(
                f"vLLM cannot start a {'/'.join(config.get('architectures') or ('model',))} ({type(error).__name__}: "
                f"{str(error)[:500]}): leave out `engine: vllm`, or lower engine.cache or the tasks' `max_length`"
            ) from error

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes a candidate's weights, bucket by bucket, and forgets what it knew of the last one's.

        Args:
            weights: All weights of the model by the checkpoint's names.

        Raises:
            EngineLostError: The engine has died.
        """
        try:
            self._llm.collective_rpc("begin_candidate")
            for bucket in buckets(weights, self._bucket):
                self._llm.collective_rpc("take_bucket", args=(bucket,))
            self._llm.collective_rpc("end_candidate")
            is_reset = self._llm.reset_prefix_cache()
        except (Exception, SystemExit) as error:
            raise _lost(error) from error
        if is_reset is False:
            raise EngineLostError("the engine keeps its cache of the last candidate: requests are still at work in it")

    def log_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Floats]:
        """See `TextEngine.log_likelihoods`."""
        return [
            np.array([choice.logprob for choice in choices], np.float64)
            for choices in self._tokens(sequences, likeliest=0)
        ]

    def greedy_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[tuple[Floats, Greedy]]:
        """See `TextEngine.greedy_likelihoods`."""
        return [
            (
                np.array([choice.logprob for choice in choices], np.float64),
                np.array(
                    [choice.rank == 1 for choice in choices], bool
                ),  # of equal ones, the one that the engine takes
            )
            for choices in self._tokens(sequences, likeliest=1)
        ]

    def complete(self, prompts: Sequence[Sequence[int]], most: int, generation: Any) -> list[list[int]]:
        """See `TextEngine.complete`."""
        ends = generation.eos_token_id
        outputs = self._answers(
            prompts,
            max_tokens=most,
            ignore_eos=True,
            stop_token_ids=[ends] if isinstance(ends, int) else list(ends or ()),
            repetition_penalty=generation.repetition_penalty or 1.0,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _tokens(self, sequences: Sequence[Sequence[int]], likeliest: int) -> Iterator[list[Any]]:
        """The `Logprob`s of each sequence's tokens but the first.

        Args:
            sequences: Token ids.
            likeliest: Also look for so many of the likeliest tokens at each position, which makes those have rank 1 and on.
        """
        outputs = self._answers(sequences, max_tokens=1, prompt_logprobs=likeliest)
        for output, ids in zip(outputs, sequences, strict=True):
            yield [choices[token] for choices, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]

    def _answers(self, prompts: Sequence[Sequence[int]], **parameters: Any) -> list[Any]:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, detokenize=False, **parameters)
        try:
            return list(
                self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], greedy, use_tqdm=False)
            )
        except (Exception, SystemExit) as error:
            raise _lost(error) from error


def require_served(generation: Any) -> None:
    """Looks whether the engine can generate as transformers does.

    Args:
        generation: transformers' `GenerationConfig`.

    Raises:
        EngineError: It cannot.
    """
    for name, off in UNSERVED.items():
        if (value := getattr(generation, name, None)) not in (None, off, []):
            raise EngineError(
                f"generation_config.json or the task's arguments of generation have {name}: {value}, which the engine knows "
                "nothing of: leave out `engine: vllm`, or the setting"
            )


def buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in lists of at most `size` bytes, or of one tensor."""
    bucket: list[tuple[str, Tensor]] = []
    filled = 0
    for name, value in weights:
        if bucket and filled + value.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, value))
        filled += value.nbytes
    if bucket:
        yield bucket


def _bear_wrappers() -> None:
    """Has vLLM's CPU backend start where llvmlite is imported, as it is once anything was merged.

    It looks at the `vars` of everything in every module; those of llvmlite's library are no dictionary.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:
        return

    def dictionary(value: Any) -> Any:
        fields = vars(value)
        return fields if isinstance(fields, Mapping) else {}

    dispatcher.vars = dictionary


def _lost(error: BaseException) -> EngineLostError:
    return EngineLostError(f"the engine has died ({type(error).__name__}: {str(error)[:500]})")
