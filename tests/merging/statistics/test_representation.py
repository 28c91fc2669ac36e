import pytest
import torch

from merging.errors import StatisticsError
from merging.statistics import Partial, Representation, RepresentationSettings, measure, measure_shard
from merging.tasks.task import Batch


def representation(pooling: str = "cls", batch_size: int = 3) -> Representation:
    return Representation(RepresentationSettings(pooling=pooling, batch_size=batch_size))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_row_an_example_without_padding(build, pooling):
    task = build("bert")
    model = task.load_model()
    result = representation().finalize(measure(task, representation(pooling)))
    with torch.no_grad():
        for position in range(7):
            (batch,) = task.batches("train", position, position + 1, 1)
            states = task.representation(model, batch)[0]
            expected = states[0] if pooling == "cls" else states.mean(0)
            torch.testing.assert_close(result["representation"][position], expected.float())
    assert result["positions"].tolist() == list(range(7))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_decoder_s_last_real_token_and_an_encoder_s_first_stand_for_a_text(build, name, side):
    task = build(name)
    ids, mask = task.inputs["input_ids"], task.mask.bool()
    ids[:, 0] = 5  # a token that every text begins with
    if side == "left":
        task.inputs["input_ids"] = ids = torch.stack(
            [row.roll(int((~real).sum())) for row, real in zip(ids, mask, strict=True)]
        )
        task.inputs["attention_mask"] = task.mask = task.mask.flip(1)
    task.batches = lambda split, start, stop, size: iter([Batch(task.inputs, task.labels, torch.arange(7), task.mask)])
    result = representation().finalize(measure(task, representation()))["representation"]
    with torch.no_grad():
        states = task.representation(task.load_model(), Batch(task.inputs, task.labels, torch.arange(7), task.mask))
    for position in range(7):
        places = task.mask[position].nonzero().flatten()
        expected = states[position, places[0] if name == "bert" else places[-1]]
        torch.testing.assert_close(result[position], expected.float())
    assert float(result.std(0).max()) > 1e-3


def test_no_spread_is_refused(build):
    task = build("bert")
    task.inputs["input_ids"][:] = task.inputs["input_ids"][:1].clone()
    task.inputs["attention_mask"][:] = 1
    task.mask = task.inputs["attention_mask"]
    with pytest.raises(StatisticsError, match="same representation"):
        representation().finalize(measure(task, representation()))


def test_mean_over_images_patches(build):
    task = build("vit")
    result = representation().finalize(measure(task, representation("mean")))["representation"]
    with torch.no_grad():
        (batch,) = task.batches("train", 0, 7, 7)
        states = task.representation(task.load_model(), batch)
    torch.testing.assert_close(result, states.mean(1).float())


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
