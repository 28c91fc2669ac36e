import pytest
import torch

from merging.errors import StatisticsError
from merging.statistics import STATISTICS, Gram, StatisticSettings, measure, measure_shard, number_of_examples


def test_all_kinds_are_registered():
    assert set(STATISTICS) == {"fisher", "gram", "output_gram", "representation"}
    for kind in STATISTICS:
        statistic = STATISTICS[kind](STATISTICS[kind].settings_type())
        assert statistic.key()["statistic"] == kind
    with pytest.raises(StatisticsError, match="Did you mean 'fisher'"):
        STATISTICS["fischer"]


def test_settings_bound_the_examples(build):
    task = build("bert")
    some = Gram(StatisticSettings(examples=4, batch_size=3))
    assert number_of_examples(task, some) == 4
    assert number_of_examples(task, Gram(StatisticSettings())) == 7
    serial = measure(task, some)
    assert serial.counts["examples"] == 4
    shard = measure_shard(task, some, "train", 0, 4)
    assert all(torch.equal(shard.sums[name], value) for name, value in serial.sums.items())


def test_no_examples_or_no_logits_are_refused(build):
    task = build("bert")
    statistic = Gram(StatisticSettings())
    with pytest.raises(StatisticsError, match="'tiny' has no validation examples"):
        measure(task, statistic, "validation")
    task.has_logits = False
    with pytest.raises(StatisticsError, match="only scores whole models"):
        number_of_examples(task, statistic)
