"""What answers for a causal language model in a live module's place."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from merging.tasks.predictions import Floats

Greedy: TypeAlias = npt.NDArray[np.bool_]
"""Whether each token is the likeliest at its position."""


class TextEngine(ABC):
    """An inference engine that holds one model's weights: likelihoods and greedy completions of token ids."""

    @abstractmethod
    def log_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Floats]:
        """Of each sequence's tokens but the first, given those before them, in nats; float64 [tokens − 1] each.

        Raises:
            EngineLostError: The engine has died.
        """

    @abstractmethod
    def greedy_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[tuple[Floats, Greedy]]:
        """Log-likelihoods as `log_likelihoods` gives them, and whether each token is the likeliest [tokens − 1].

        Raises:
            EngineLostError: The engine has died.
        """

    @abstractmethod
    def complete(self, prompts: Sequence[Sequence[int]], most: int, generation: Any) -> list[list[int]]:
        """Each prompt's likeliest next tokens, one after another.

        Args:
            prompts: Token ids.
            most: Tokens at most.
            generation: transformers' `GenerationConfig`: what ends a completion, and what is done to its likelihoods.

        Raises:
            EngineLostError: The engine has died.
        """


@dataclass
class EngineNeeds:
    """What a task asks of an engine.

    Args:
        longest: Tokens of the longest sequence, prompt and completion.
        generations: transformers' `GenerationConfig`s that it generates by.
    """

    longest: int = 0
    generations: list[Any] = field(default_factory=list)


class NeedsRecorder(TextEngine):
    """An engine without a model, noting down what it is asked for. All tokens are certain, and no completion ends early."""

    def __init__(self) -> None:
        self._longest = 0
        self._generations: dict[str, Any] = {}

    @property
    def needs(self) -> EngineNeeds:
        """What was asked so far."""
        return EngineNeeds(self._longest, list(self._generations.values()))

    def log_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Floats]:
        """See `TextEngine.log_likelihoods`."""
        self._longest = max([self._longest, *map(len, sequences)])
        return [np.zeros(len(ids) - 1) for ids in sequences]

    def greedy_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[tuple[Floats, Greedy]]:
        """See `TextEngine.greedy_likelihoods`."""
        return [(zeros, np.ones(len(zeros), bool)) for zeros in self.log_likelihoods(sequences)]

    def complete(self, prompts: Sequence[Sequence[int]], most: int, generation: Any) -> list[list[int]]:
        """See `TextEngine.complete`."""
        self._longest = max([self._longest, *(len(ids) + most for ids in prompts)])
        settings: Mapping[str, Any] = generation.to_dict()
        self._generations.setdefault(repr(sorted(settings.items())), generation)
        return [[0] * most for _ in prompts]
