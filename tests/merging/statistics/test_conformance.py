"""What every registered statistic must do."""

import torch

from merging.statistics import (
    STATISTICS,
    Fisher,
    Gram,
    LikelihoodSettings,
    OutputGram,
    OutputGramSettings,
    Representation,
    RepresentationSettings,
    StatisticSettings,
)
from merging.statistics.capture.single_examples import single_examples
from merging.testing.reference import brute_force
from merging.testing.statistics import StatisticTests


class TestFisher(StatisticTests):
    def statistic(self, batch_size):
        return Fisher(LikelihoodSettings(estimator="exact", batch_size=batch_size))

    def expected(self, task):
        return {name: value / task.size("train") for name, value in brute_force(task).fisher.items()}


class TestGram(StatisticTests):
    def statistic(self, batch_size):
        return Gram(StatisticSettings(batch_size=batch_size))

    def expected(self, task):
        sums = brute_force(task)
        return {name: value / sums.rows[name] for name, value in sums.gram.items()}


class TestOutputGram(StatisticTests):
    def statistic(self, batch_size):
        return OutputGram(OutputGramSettings(estimator="exact", batch_size=batch_size))

    def expected(self, task):
        sums = brute_force(task)
        return {name: value / sums.rows[name] for name, value in sums.output_gram.items()}


class TestRepresentation(StatisticTests):
    def statistic(self, batch_size):
        return Representation(RepresentationSettings(pooling="mean", batch_size=batch_size))

    def expected(self, task):
        model = task.load_model()
        (batch,) = task.batches("train", 0, task.size("train"), task.size("train"))
        with torch.no_grad():
            rows = [task.representation(model, one)[0].mean(0) for one in single_examples(batch, unpadded=True)]
        return {"representation": torch.stack(rows), "positions": torch.arange(len(rows))}


def test_every_statistic_is_tested():
    assert {"fisher", "gram", "output_gram", "representation"} <= set(STATISTICS)
