"""The suite for engines, on one that is a live model, and on ones that are wrong."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from merging.testing.engines import EngineTests
from tests.live_engine import Transformers


def start(config):
    return Transformers(AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval())


class TestALiveModel(EngineTests):
    @pytest.fixture
    def make_engine(self):
        return start


class Stale(Transformers):
    """Keeps the first weights of one matrix."""

    def load(self, weights):
        kept = [(name, value) for name, value in weights if not hasattr(self, "loaded") or "o_proj" not in name]
        self.loaded = True
        super().load(kept)


class Shifted(Transformers):
    """Gives each token the likelihood of the next one."""

    def log_likelihoods(self, sequences):
        return [torch.tensor(own).roll(-1).numpy() for own in super().log_likelihoods(sequences)]


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (Stale, EngineTests.test_a_candidate_leaves_nothing_behind),
        (Shifted, EngineTests.test_likelihoods_are_those_of_transformers),
    ],
)
def test_the_suite_finds_what_is_wrong(wrong, test):
    model = EngineTests.model.__wrapped__(None)
    engine = wrong(AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval())
    engine.load(list(model.named_parameters()))
    with pytest.raises(AssertionError):
        test(EngineTests(), engine, model)
