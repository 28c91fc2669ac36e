"""Grams that are kept as sketches: measured in parts, written, read and checked."""

import pytest
import torch

from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import StatisticsError
from merging.kernels.gram_sketch import dense, diagonal, extents, is_sketch, random_vectors, stored_shape
from merging.statistics import Gram, GramSettings, Measurement, StatisticSettings, StatisticsFile, measure, save

RANK = 6


def nystrom(gram, rank):
    """The definition, with a pseudo-inverse."""
    omega = random_vectors(len(gram), rank).double()
    products = gram @ omega
    low = products @ torch.linalg.pinv(omega.T @ products, hermitian=True) @ products.T
    return low + torch.diag(gram.diagonal() - low.diagonal())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_is_measured_in_batches_shards_and_parts_and_kept(build, name, tmp_path):
    """Against the same of the whole Gram, and through a file."""
    task = build(name)
    whole = Gram(StatisticSettings(batch_size=3))
    exact = whole.finalize(measure(task, whole))
    statistic = Gram(GramSettings(batch_size=3, rank=RANK))
    measurement = Measurement(statistic, task, "train", task.load_model())
    measurement.add(3, 7)
    measurement.add(0, 3)
    partial = measurement.partial()
    save(f"{tmp_path}/gram.safetensors", statistic, partial, checkpoint="c", data="d")
    file = StatisticsFile.open(f"{tmp_path}/gram.safetensors")
    assert file.settings["rank"] == RANK
    sketches = [one for one in exact if is_sketch(file.read(one))]
    assert sketches
    for one, gram in exact.items():
        kept = file.read(one)
        assert extents(kept.shape) == gram.shape
        if one not in sketches:
            torch.testing.assert_close(kept, gram, rtol=1e-4, atol=1e-5)
            continue
        assert gram.shape[-1] >= 4 * RANK
        torch.testing.assert_close(dense(kept), nystrom(gram.double(), RANK), rtol=0, atol=1e-3 * float(gram.max()))
        torch.testing.assert_close(diagonal(kept), gram.diagonal(), rtol=1e-4, atol=1e-6)


def test_a_file_knows_the_weight_of_a_sketch(build, tmp_path):
    task = build("bert")
    statistic = Gram(GramSettings(batch_size=7, rank=RANK))
    partial = measure(task, statistic)
    file = save(f"{tmp_path}/gram.safetensors", statistic, partial, checkpoint="c", data="d")
    task.load_model().save_pretrained(tmp_path / "model")
    tensors = Checkpoint.open(str(tmp_path / "model")).tensors
    file.check("c", tensors)
    wide = next(name for name, value in partial.sums.items() if is_sketch(value))
    partial.sums[wide] = torch.zeros(stored_shape(4 * RANK + 1, RANK))
    other = save(f"{tmp_path}/other.safetensors", statistic, partial, checkpoint="c", data="d")
    with pytest.raises(StatisticsError, match="its weight asks for"):
        other.check("c", tensors)


def test_a_damaged_sketch_is_refused(build, tmp_path):
    statistic = Gram(GramSettings(batch_size=7, rank=RANK))
    for place, problem in (((-1, 0), "not symmetric"), ((0, -1), "negative entries on its diagonal")):
        partial = measure(build("bert"), statistic)
        name = next(name for name, value in partial.sums.items() if is_sketch(value))
        partial.sums[name][place] -= 1e6
        bad = save(f"{tmp_path}/bad.safetensors", statistic, partial, checkpoint="c", data="d")
        with pytest.raises(StatisticsError, match=problem):
            bad.read(name)


def test_the_key_is_as_before_where_all_are_whole():
    assert Gram(GramSettings()).key() == Gram(StatisticSettings()).key()
    assert Gram(GramSettings(rank=8)).key()["rank"] == 8
