"""What every kind of task must do, as a class of tests."""

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import nn

from merging.errors import TaskError
from merging.statistics import (
    Fisher,
    Gram,
    LikelihoodSettings,
    OutputGram,
    OutputGramSettings,
    Statistic,
    StatisticSettings,
    measure,
    measure_shard,
)
from merging.tasks.predictions import Predictions
from merging.tasks.task import TASKS, Split, Task
from merging.testing.reference import brute_force
from merging.testing.statistics import close

MakeTask: TypeAlias = Callable[..., Task]
"""Makes the task anew on the same data, bound to the same checkpoint; keywords change its settings."""
NEAR = 2e-5
"""How far numbers may be from each other, relative to the largest: models of these tests are in float32."""


class TaskTests:
    """Subclass it as `Test…` with the fixture `make_task`, and `broken` for bad data.

    The task has splits train, validation and test of at least six examples, of differing lengths where it has lengths, and a
    small random model, so that no two of its predictions are alike.

    ```python
    class TestMyTask(TaskTests):
        @pytest.fixture
        def make_task(self, tmp_path):
            return lambda **settings: MyTask("mine", MySettings(data=DATA, **settings), HEAD)
    ```
    """

    examples: int = 6
    """Examples of a split that statistics are measured on."""

    @pytest.fixture
    def make_task(self) -> MakeTask:
        """See `MakeTask`; it must take `batch_size` where the kind has one."""
        raise NotImplementedError("override the fixture `make_task`")

    @pytest.fixture
    def broken(self) -> Sequence[tuple[Callable[[], Task], str]]:
        """Tasks whose `check` must end in a `TaskError`, each with what its message matches (file, row, column)."""
        return []

    def test_it_is_registered_and_passes_its_check(self, make_task: MakeTask) -> None:
        """Files name it by its kind."""
        task = make_task()
        kind, settings = TASKS[task.kind]
        assert type(task) is kind
        assert isinstance(task.settings, settings)
        again = settings.model_validate(task.settings.model_dump(mode="json"))
        assert again == task.settings
        assert all(isinstance(note, str) for note in task.check())
        assert all(task.has_split(split) for split in ("train", "validation", "test"))

    def test_its_data_have_a_fingerprint(self, make_task: MakeTask) -> None:
        """The same for the same data, another for others."""
        splits: Sequence[Split] = ("train", "validation", "test")
        one, other = make_task(), make_task()
        assert [one.data_fingerprint(split) for split in splits] == [other.data_fingerprint(split) for split in splits]
        assert len({one.data_fingerprint(split) for split in splits}) == 3

    def test_the_order_is_fixed_and_batches_cover_the_split(self, make_task: MakeTask) -> None:
        """What is called the k-th example is the same one for all candidates."""
        one, other, size = make_task(), make_task(), make_task().size("train")
        first, second = (list(task.batches("train", 0, size, 4)) for task in (one, other))
        indices = torch.cat([batch.indices for batch in first])
        assert sorted(indices.tolist()) == list(range(size))
        assert torch.equal(indices, torch.cat([batch.indices for batch in second]))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.labels, b.labels) or bool(a.labels.isnan().all())
            assert a.inputs.keys() == b.inputs.keys()
            assert all(torch.equal(value, b.inputs[name]) for name, value in a.inputs.items())

    def test_shards_are_parts_of_the_whole(self, make_task: MakeTask) -> None:
        """Wherever a split is cut."""
        task, size = make_task(), make_task().size("train")
        whole = torch.cat([batch.indices for batch in task.batches("train", 0, size, size)])
        for cuts in ([0, 1, size], [0, size // 2, size - 1, size]):
            parts = [batch.indices for start, stop in pairwise(cuts) for batch in task.batches("train", start, stop, 3)]
            assert torch.equal(torch.cat(parts), whole)
        assert not list(task.batches("train", size, size + 5, 3))

    def test_a_limit_takes_the_first_examples_of_the_order(self, make_task: MakeTask) -> None:
        """The same ones at every call; one beyond the split is none."""
        task = make_task()
        model = task.load_model()
        few = task.evaluate(model, "validation", limit=4)
        assert few.examples == 4
        assert few.value == task.score(task.predict(model, "validation", np.arange(4))).value
        assert few.value == make_task().evaluate(model, "validation", limit=4).value
        whole = task.evaluate(model, "validation")
        assert whole.examples == task.size("validation")
        assert task.evaluate(model, "validation", limit=10_000).value == whole.value

    def test_neither_batch_size_nor_padding_change_predictions(self, make_task: MakeTask) -> None:
        """One by one, or all together."""
        alone, together = make_task(batch_size=1), make_task(batch_size=64)
        model, places = alone.load_model(), np.arange(alone.size("validation"))
        same(alone.predict(model, "validation", places), together.predict(model, "validation", places))

    def test_predictions_of_some_are_those_of_all(self, make_task: MakeTask) -> None:
        """Asked for by place, in any order, or step by step."""
        task = make_task()
        model, size = task.load_model(), task.size("validation")
        whole = task.predict(model, "validation", np.arange(size))
        assert len(whole) == size
        places = np.array([size - 1, 0, 3])
        same(task.predict(model, "validation", places), whole.take(places))
        steps = [task.predict(model, "validation", np.arange(size)[first : first + 4]) for first in range(0, size, 4)]
        same(Predictions.join(steps), whole)
        joined, expected = task.score(Predictions.join(steps)), task.evaluate(model, "validation")
        assert joined.value == pytest.approx(expected.value, rel=1e-4, abs=1e-6)
        assert joined.metric == expected.metric == task.judged_by

    def test_a_score_is_made_of_its_predictions(self, make_task: MakeTask) -> None:
        """One finite number per example; the mean of these where the metric is one."""
        task = make_task()
        score, predictions = task.measure(task.load_model(), "test")
        assert predictions is not None
        assert np.isfinite(predictions.values).all()
        assert score.standard_error >= 0
        if score.is_mean:
            assert score.value == pytest.approx(float(predictions.values.mean()))
        influences = task.influences(predictions)
        if influences is not None:
            assert score.value == pytest.approx(float(influences.mean()), rel=1e-4, abs=1e-6)
            assert score.standard_error == pytest.approx(
                float(influences.std()) / len(influences) ** 0.5, rel=0.5, abs=1e-9
            )
        if task.has_surrogates:
            assert predictions.surrogates is not None
            assert score.expected_error == pytest.approx(1 - float(predictions.surrogates.mean()))
            assert ((predictions.surrogates >= 0) & (predictions.surrogates <= 1)).all()
            assert len(np.unique(predictions.surrogates)) > 1
        if predictions.losses is not None:
            assert score.loss == pytest.approx(float(predictions.losses.mean()))
        if not task.can_be_negative:
            assert score.value >= 0

    def test_a_model_that_gives_nan_is_refused(self, make_task: MakeTask) -> None:
        """A search must not pick it."""
        task = make_task()
        model = task.load_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        with pytest.raises(TaskError, match=f"'{task.name}'"):
            task.evaluate(model, "validation")

    def test_what_is_exported_scores_the_same(self, make_task: MakeTask, tmp_path: Path) -> None:
        """Changed weights, written by `save_pretrained` and read again."""
        task = make_task()
        model: Any = changed(task.load_model())
        before = task.evaluate(model, "test")
        assert before.value != task.evaluate(task.load_model(), "test").value or before.loss != 0
        shutil.copytree(task.head, tmp_path / "exported")
        model.save_pretrained(tmp_path / "exported")
        exported = make_task()
        exported.head = str(tmp_path / "exported")
        after = exported.evaluate(exported.load_model(), "test")
        assert after.value == pytest.approx(before.value, rel=1e-6)
        if not np.isnan(before.loss):
            assert after.loss == pytest.approx(before.loss, rel=1e-5)

    def test_statistics_are_their_definitions(self, make_task: MakeTask) -> None:
        """Fisher, Gram and output Gram, batched and padded, against examples alone."""
        task = make_task()
        if not task.has_logits:
            pytest.skip("it gives no logits")
        expected = brute_force(task, "train", self.examples)
        for kind, values in (
            ("fisher", expected.fisher),
            ("gram", expected.gram),
            ("output_gram", expected.output_gram),
        ):
            partial = measure(task, self._statistic(kind, task))
            sums = partial.sums | {name: partial.sums[holder] for name, holder in partial.shared.items()}
            common = {name: value for name, value in values.items() if name in sums}
            assert all(not bool(value.any()) for name, value in values.items() if name not in sums), kind
            close({name: sums[name] for name in common}, common, tolerance=2e-3)

    def test_statistics_of_shards_add_up(self, make_task: MakeTask) -> None:
        """As a cluster measures them."""
        task = make_task()
        if not task.has_logits:
            pytest.skip("it gives no logits")
        statistic = self._statistic("gram", task)
        whole = measure(task, statistic)
        middle = self.examples // 2
        parts = [measure_shard(task, statistic, "train", *ends) for ends in ((middle, self.examples), (0, middle))]
        total = parts[0].combine(parts[1])
        assert total.counts == whole.counts
        close(total.sums, whole.sums, tolerance=1e-3)

    def test_representations_have_a_row_for_every_position(self, make_task: MakeTask) -> None:
        """What members' likeness is taken from."""
        task = make_task()
        if not task.has_logits:
            pytest.skip("it gives no representations")
        (batch,) = task.batches("train", 0, 4, 4)
        with torch.no_grad():
            states = task.representation(task.load_model(), batch)
        assert states.dim() == 3
        assert len(states) == 4
        assert bool(states.isfinite().all())

    def test_bad_data_are_refused_with_their_place(self, broken: Sequence[tuple[Callable[[], Task], str]]) -> None:
        """Before any work starts."""
        for make, message in broken:
            with pytest.raises(TaskError, match=message):
                make().check()

    def _statistic(self, kind: str, task: Task) -> Statistic:
        """A statistic of few examples, in batches of some."""
        size, estimator = {"examples": self.examples, "batch_size": 4}, "exact" if task.one_label else "empirical"
        if kind == "gram":
            return Gram(StatisticSettings(**size))
        if kind == "fisher":
            return Fisher(LikelihoodSettings(estimator=estimator, **size))
        return OutputGram(OutputGramSettings(estimator=estimator, **size))


def changed(model: nn.Module) -> nn.Module:
    """A model whose weights were moved, as a merge moves them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def same(predictions: Predictions, expected: Predictions) -> None:
    """Asserts that what is said of single examples agrees but for rounding."""
    for name in ("surrogates", "losses", "entropies"):
        one, other = getattr(predictions, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one == pytest.approx(other, rel=1e-3, abs=NEAR * max(1.0, float(np.abs(other).max()))), name
    assert predictions.values == pytest.approx(expected.values, rel=1e-3, abs=1e-4)
