"""What answers for a causal language model in a live module's place."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from merging.tasks.predictions import Floats


class TextEngine(ABC):
    """An inference engine that holds one model's weights: likelihoods and greedy completions of token ids."""

    @abstractmethod
    def log_likelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Floats]:
        """Of each sequence's tokens but the first, given those before them, in nats; float64 [tokens − 1] each.

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
