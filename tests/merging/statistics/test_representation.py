import pytest
import torch

from merging.errors import StatisticsError
from merging.statistics import Partial, Representation, RepresentationSettings, measure, measure_shard


def representation(pooling: str = "cls", batch_size: int = 3) -> Representation:
    return Representation(RepresentationSettings(pooling=pooling, batch_size=batch_size))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_row_an_example_without_padding(build, pooling):
    task = build("bert")
    model = task.load_model()
    found = representation().finalize(measure(task, representation(pooling)))
    with torch.no_grad():
        for position in range(7):
            (batch,) = task.batches("train", position, position + 1, 1)
            states = task.representation(model, batch)[0]
            expected = states[0] if pooling == "cls" else states.mean(0)
            torch.testing.assert_close(found["representation"][position], expected.float())
    assert found["positions"].tolist() == list(range(7))


def test_mean_over_images_patches(build):
    task = build("vit")
    found = representation().finalize(measure(task, representation("mean")))["representation"]
    with torch.no_grad():
        (batch,) = task.batches("train", 0, 7, 7)
        states = task.representation(task.load_model(), batch)
    torch.testing.assert_close(found, states.mean(1).float())


def test_sharded_is_serial_and_ordered_by_position(build, sharded):
    task = build("bert")
    serial = representation().finalize(measure(task, representation(batch_size=7)))
    parts = representation().finalize(sharded(task, representation(batch_size=2)))
    assert torch.equal(parts["positions"], serial["positions"])
    torch.testing.assert_close(parts["representation"], serial["representation"])


def test_an_example_counts_once(build):
    task = build("bert")
    first = measure_shard(task, representation(), "train", 0, 3)
    with pytest.raises(StatisticsError, match="both hold example 2"):
        first.combine(measure_shard(task, representation(), "train", 2, 5))


def test_nothing_or_nan_cannot_be_finalized():
    with pytest.raises(StatisticsError, match="no examples"):
        representation().finalize(Partial())
    rows = {4: torch.ones(2), 9: torch.tensor([1.0, torch.nan])}
    with pytest.raises(StatisticsError, match="example 9 holds NaN"):
        representation().finalize(Partial(counts={"examples": 2}, rows=rows))
