"""What every statistic must do, as a class of tests."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from merging.errors import StatisticsError
from merging.statistics import (
    STATISTICS,
    Measurement,
    Partial,
    Statistic,
    StatisticsFile,
    measure,
    measure_shard,
    save,
)
from merging.tasks.task import Task
from merging.testing.memory_task import tiny_encoder

TOLERANCE = 1e-6
"""Relative to a tensor's largest entry: models of these tests are in float64."""


class StatisticTests:
    """Subclass it as `Test…` with `statistic`; perhaps with the fixture `task` of another model than a small BERT classifier.

    ```python
    class TestMyStatistic(StatisticTests):
        def statistic(self, batch_size):
            return MyStatistic(MySettings(batch_size=batch_size))

        def expected(self, task):
            ...  # float64, from the definition, example by example
    ```
    """

    def statistic(self, batch_size: int) -> Statistic:
        """The statistic, measured in batches of this size."""
        raise NotImplementedError("override `statistic`")

    def expected(self, task: Task) -> Mapping[str, Tensor]:
        """What `finalize` must give for all of a task's examples, from the definition: slow, and obvious."""
        raise NotImplementedError("override `expected`")

    @pytest.fixture
    def task(self) -> Task:
        """A task with seven training examples of differing lengths, its model in float64."""
        return tiny_encoder()

    def spread(self, partial: Partial) -> dict[str, Tensor]:
        """A partial's means under every name, shared or not."""
        means = self.statistic(1).finalize(partial)
        return means | {name: means[holder] for name, holder in partial.shared.items()}

    def test_is_its_definition(self, task: Task) -> None:
        """Example by example, without padding."""
        close(self.spread(measure(task, self.statistic(3))), self.expected(task), tolerance=1e-5)

    def test_neither_batches_nor_padding_change_it(self, task: Task) -> None:
        """One by one, a few together, all together."""
        alone = measure(task, self.statistic(1))
        for size in (2, 7):
            together = measure(task, self.statistic(size))
            assert together.counts == alone.counts
            close(self.spread(together), self.spread(alone))

    def test_shards_add_up_in_any_order(self, task: Task) -> None:
        """As a cluster cuts the work."""
        ends = ((0, 2), (2, 5), (5, task.size("train")))
        whole = measure(task, self.statistic(3))
        for order in ((0, 1, 2), (2, 0, 1)):
            parts = [measure_shard(task, self.statistic(2), "train", *pair) for pair in ends]
            total = parts[order[0]].combine(parts[order[1]]).combine(parts[order[2]])
            assert total.counts == whole.counts
            close(self.spread(total), self.spread(whole))

    def test_shards_are_added_to_one_sum_as_they_come(self, task: Task) -> None:
        """As a process of a cluster measures them, also after it was asked what it has."""
        measurement = Measurement(self.statistic(2), task, "train", task.load_model())
        measurement.add(3, 5)
        measurement.add(0, 3)
        assert measurement.partial().counts["examples"] == 5
        measurement.add(5, task.size("train"))
        whole = measure(task, self.statistic(3))
        assert measurement.partial().counts == whole.counts
        close(self.spread(measurement.partial()), self.spread(whole))

    def test_blocks_of_rows_are_finalized_by_themselves(self, task: Task) -> None:
        """A large sum is never whole in one place."""
        partial = measure(task, self.statistic(3))
        whole, outline = self.statistic(3).finalize(partial), partial.outline()
        for block in outline.blocks(1 << 9):
            part = self.statistic(3).finalize(outline.of_block(block, partial.block(block)))
            for name, start, stop in block:
                assert torch.equal(part[name], whole[name][start:stop] if whole[name].dim() else whole[name])

    def test_no_examples_are_neutral_and_no_result(self, task: Task) -> None:
        """A shard may be empty; a statistic may not."""
        whole = measure(task, self.statistic(3))
        nothing = self.statistic(3).measure(task.load_model(), task, [])
        assert nothing.combine(whole) is whole
        with pytest.raises(StatisticsError):
            self.statistic(3).finalize(Partial())

    def test_the_model_is_left_as_it_was(self, task: Task) -> None:
        """Weights, modes and hooks."""
        model = task.load_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        required = [parameter.requires_grad for parameter in model.parameters()]
        self.statistic(3).measure(model, task, task.batches("train", 0, 5, 3))
        assert not model.training
        assert [parameter.requires_grad for parameter in model.parameters()] == required
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_it_is_known_by_its_kind_and_its_key_has_no_batch_size(self) -> None:
        """What is kept under a key is what was measured, however it was cut."""
        one = self.statistic(2)
        assert STATISTICS[one.kind] is type(one)
        assert one.key() == self.statistic(5).key()
        assert one.key()["version"] == one.version

    def test_its_file_holds_what_was_measured(self, task: Task, tmp_path: object) -> None:
        """Float32, under the checkpoint's names."""
        one, partial = self.statistic(3), measure(task, self.statistic(3))
        save(f"{tmp_path}/x.safetensors", one, partial, checkpoint="c", data="d")
        file = StatisticsFile.open(f"{tmp_path}/x.safetensors")
        assert file.kind == one.kind
        for name, value in self.spread(partial).items():
            assert torch.equal(file.read(name), value)

    def test_nan_is_an_error_that_names_it(self, task: Task) -> None:
        """A member whose weights make it overflow."""
        partial = measure(task, self.statistic(3))
        for value in (*partial.sums.values(), *partial.rows.values()):
            value.fill_(float("nan"))
        with pytest.raises(StatisticsError, match="NaN"):
            self.statistic(3).finalize(partial)


def close(values: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Asserts that two statistics agree, relative to each tensor's largest entry, and to the largest of all.

    What has no gradient but for rounding (a key's bias) is small beside all others.
    """
    assert values.keys() == expected.keys()
    largest = max((float(value.abs().max()) for value in expected.values() if value.is_floating_point()), default=0.0)
    for name, value in values.items():
        wanted = expected[name].double()
        scale = max(float(wanted.abs().max()), 1e-9 * largest, 1e-30)
        error = float((value.double() - wanted).abs().max()) / scale
        assert error <= tolerance, f"{name}: relative error {error:.3g}"
