"""lm-evaluation-harness on an inference engine: prompts are cut into tokens as the harness does for transformers."""

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from merging.errors import TaskError
from merging.tasks.language.text_engine import TextEngine
from merging.tasks.language.token_padding import padded

BATCH = 1024
"""Requests that an engine is given at a time; it makes its own batches of them."""
FIRST_ROUND = 32
"""Tokens that are generated before stop sequences are looked for the first time; each round has twice as many as the last."""
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
"""Arguments of generation that have no meaning where it is greedy, as it is for all of these tasks."""


class EngineLM(HFLM):  # type: ignore[misc]
    """The harness's class for models of transformers, with an engine in the place of the model.

    Requests become tokens, windows, and truncated contexts by the harness's own code, so that they are the same in both.

    Args:
        engine: Holds the model's weights.
        config: The model's configuration in transformers.
        generation: transformers' `GenerationConfig` of the checkpoint.
        tokenizer: Of the checkpoint.
        max_length: Tokens that the model reads; by default what it can.
    """

    def __init__(
        self, engine: TextEngine, config: Any, generation: Any, tokenizer: Any, max_length: int | None = None
    ) -> None:
        super().__init__(
            pretrained=SimpleNamespace(config=config, device=torch.device("cpu")),
            backend="causal",
            tokenizer=tokenizer,
            batch_size=BATCH,
            max_length=max_length,
        )
        self._engine, self._generation = engine, generation

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each (text, context, continuation): the continuation's log-likelihood, and whether it is the greedy one."""
        sequences = [[*context, *continuation][-(self.max_length + 1) :] for _, context, continuation in requests]
        targets = [len(continuation) for _, _, continuation in requests]
        if too_long := max((size for size in targets if size > self.max_length), default=0):
            raise TaskError(f"a continuation has {too_long} tokens, `max_length` is {self.max_length}: raise it")
        answers = self._engine.greedy_likelihoods(sequences)
        return [
            (float(likelihoods[-size:].sum()), bool(greedy[-size:].all()))
            for (likelihoods, greedy), size in zip(answers, targets, strict=True)
        ]

    def _model_generate(self, context: Tensor, max_length: int, stop: Sequence[str], **arguments: Any) -> Tensor:
        """Context and greedy completion of each row [N, S + new], as `HFLM._model_generate` gives them.

        Args:
            context: Token ids, padded on the left [N, S].
            max_length: Tokens of context and completion.
            stop: Texts that end a completion.
            arguments: `attention_mask` [N, S], and those of transformers' `generate`.

        Raises:
            TaskError: transformers' generation has no such argument, or a prompt has no token.
        """
        mask = arguments.pop("attention_mask").bool()
        prompts = [row[real].tolist() for row, real in zip(context, mask, strict=True)]
        if not all(prompts):
            raise TaskError(
                "a prompt has no token, and the tokenizer puts none before it: nothing can be generated from it"
            )
        generation = self._settings(arguments)
        most = generation.max_new_tokens or max_length - context.shape[1]
        new = self._complete(prompts, most, [text for text in stop if text], generation)
        return torch.cat([context, padded(new, self.tokenizer.pad_token_id, left=False)[0]], dim=1)

    def _settings(self, arguments: Mapping[str, Any]) -> Any:
        """The checkpoint's `GenerationConfig` with a task's arguments; the end-of-text token always ends a completion."""
        generation = copy.deepcopy(self._generation)
        unknown = generation.update(**{name: value for name, value in arguments.items() if name not in SAMPLING})
        if unknown:
            raise TaskError(f"transformers' generation has no `{min(unknown)}`: leave it out of the task's arguments")
        given = generation.eos_token_id
        ends = [given] if isinstance(given, int) else list(given or ())
        generation.eos_token_id = sorted({*ends, *([] if self.eot_token_id is None else [self.eot_token_id])})
        return generation

    def _complete(
        self, prompts: Sequence[Sequence[int]], most: int, stop: Sequence[str], generation: Any
    ) -> list[list[int]]:
        """Completions that end where one of the stop texts stands in them, or soon after.

        They are made in rounds, since an engine knows no tokenizer; what it keeps of a round makes the next one cheap.
        """
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False) if self.eot_token_id is not None else None
        texts = [text for text in stop if text != eos]
        new: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        done, size = 0, min(most, FIRST_ROUND) if texts else most
        while unfinished and size > 0:
            rounds = self._engine.complete([[*prompts[row], *new[row]] for row in unfinished], size, generation)
            done, size = done + size, min(2 * size, most - done - size)
            rows, unfinished = unfinished, []
            for row, tokens in zip(rows, rounds, strict=True):
                new[row] += tokens
                if (
                    len(new[row]) == done
                    and tokens[-1] not in generation.eos_token_id
                    and not self._stops(new[row], texts)
                ):
                    unfinished.append(row)
        return [self._cut(tokens, texts) for tokens in new]

    def _stops(self, tokens: Sequence[int], texts: Sequence[str]) -> bool:
        """Whether a stop text stands in what was generated, special tokens included."""
        whole = self.tokenizer.decode(tokens)
        return any(text in whole for text in texts)

    def _cut(self, tokens: list[int], texts: Sequence[str]) -> list[int]:
        """Tokens up to the one that completes a stop text: one of special tokens is not seen in the text any more."""
        if not self._stops(tokens, texts):
            return tokens
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._stops(tokens[:middle], texts) else (middle + 1, high)
        return tokens[:low]
