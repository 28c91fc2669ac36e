"""What every inference engine of texts must do, as a class of tests."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from merging.tasks.language.text_engine import Greedy
from merging.tasks.predictions import Floats

SEQUENCES = ([5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16, 17, 18, 19, 20, 21, 22, 23])
"""Token ids of differing lengths."""
MOST = 6
"""Tokens of a completion."""

MakeEngine: TypeAlias = Callable[[Any], Any]
"""Starts an engine for a model of transformers of this configuration; what weights it holds then does not matter."""


class EngineTests:
    """Subclass it as `Test…` with the fixture `make_engine`.

    An engine is a `TextEngine` with `load(weights)`, which takes all weights by their names in the checkpoint. It is compared
    with transformers on the same weights: `model`, a small Llama, or what an override of that fixture gives.

    ```python
    class TestMyEngine(EngineTests):
        @pytest.fixture
        def make_engine(self):
            return lambda config: MyEngine(config)
    ```
    """

    near: float = 2e-3
    """Nats that a log-likelihood may differ by."""

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        """See `MakeEngine`."""
        raise NotImplementedError("override the fixture `make_engine`")

    @pytest.fixture
    def model(self) -> Any:
        """A causal language model of transformers, in float32, without tied weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    @pytest.fixture
    def engine(self, make_engine: MakeEngine, model: Any) -> Any:
        """The engine, with the model's weights."""
        engine = make_engine(model.config)
        engine.load(weights_of(model))
        return engine

    def test_likelihoods_are_those_of_transformers(self, engine: Any, model: Any) -> None:
        """Of every token but the first."""
        answers, expected = engine.log_likelihoods(SEQUENCES), likelihoods(model, SEQUENCES)
        assert [len(own) for own in answers] == [len(ids) - 1 for ids in SEQUENCES]
        for own, (wanted, _) in zip(answers, expected, strict=True):
            np.testing.assert_allclose(own, wanted, atol=self.near, rtol=0)

    def test_it_says_which_tokens_are_the_likeliest(self, engine: Any, model: Any) -> None:
        """Beside the same likelihoods; of sequences with likely ends, so that some are."""
        sequences = [[*ids, *completed(model, ids)] for ids in SEQUENCES]
        answers, expected = engine.greedy_likelihoods(sequences), likelihoods(model, sequences)
        for (own, flags), (wanted, wanted_flags) in zip(answers, expected, strict=True):
            np.testing.assert_allclose(own, wanted, atol=self.near, rtol=0)
            assert flags.tolist() == wanted_flags.tolist()
        assert all(flags[-MOST:].all() for _, flags in answers)

    def test_it_completes_as_transformers_does(self, engine: Any, model: Any) -> None:
        """Up to so many tokens, or to the first that ends a text."""
        from transformers import GenerationConfig

        expected = [completed(model, ids) for ids in SEQUENCES]
        assert engine.complete(SEQUENCES, MOST, GenerationConfig(eos_token_id=None, pad_token_id=0)) == expected
        end = expected[0][2]
        cut = [own[: own.index(end)] if end in own else own for own in expected]
        ended = engine.complete(SEQUENCES, MOST, GenerationConfig(eos_token_id=end, pad_token_id=0))
        assert [own[: own.index(end)] if end in own else own for own in ended] == cut

    def test_no_answer_depends_on_what_else_is_asked(self, engine: Any) -> None:
        """Alone, or together with others of other lengths."""
        for ids, own in zip(SEQUENCES, engine.log_likelihoods(SEQUENCES), strict=True):
            np.testing.assert_allclose(engine.log_likelihoods([ids])[0], own, atol=self.near, rtol=0)

    def test_a_candidate_leaves_nothing_behind(self, engine: Any, model: Any) -> None:
        """Not even what was remembered of the same prompts."""
        first = engine.log_likelihoods(SEQUENCES)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        engine.load(weights_of(other))
        second = engine.log_likelihoods(SEQUENCES)
        for own, (wanted, _), before in zip(second, likelihoods(other, SEQUENCES), first, strict=True):
            np.testing.assert_allclose(own, wanted, atol=self.near, rtol=0)
            assert np.abs(own - before).max() > 10 * self.near
        engine.load(weights_of(model))
        for own, before in zip(engine.log_likelihoods(SEQUENCES), first, strict=True):
            np.testing.assert_allclose(own, before, atol=self.near, rtol=0)


def weights_of(model: Any) -> list[tuple[str, Tensor]]:
    """A model's weights by their names in a checkpoint."""
    return [(name, value.detach()) for name, value in model.named_parameters()]


def likelihoods(model: Any, sequences: Sequence[Sequence[int]]) -> list[tuple[Floats, Greedy]]:
    """What transformers gives for `TextEngine.greedy_likelihoods`, a sequence at a time."""
    answers = []
    for ids in sequences:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].double()
        wanted = torch.tensor(list(ids[1:]))
        own = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        answers.append((own.numpy(), (logits.argmax(-1) == wanted).numpy()))
    return answers


def completed(model: Any, ids: Sequence[int]) -> list[int]:
    """The likeliest next tokens, one after another, by whole forward passes."""
    whole = list(ids)
    for _ in range(MOST):
        with torch.inference_mode():
            whole.append(int(model(input_ids=torch.tensor([whole])).logits[0, -1].argmax()))
    return whole[len(ids) :]
