import pytest
import torch

from merging.errors import StatisticsError
from merging.statistics import Gram, Measurement, Partial, StatisticSettings, StatisticsFile, save, save_blocks
from merging.statistics.capture.linear_calls import UnaccountableRowsError
from merging.statistics.gram_sums import GramStatistic


def gram(batch_size=2):
    return Gram(StatisticSettings(batch_size=batch_size))


class Late(GramStatistic):
    """Finds in its third batch that examples must run alone."""

    kind, version = "gram", 0

    def accumulate(self, model, task, batches, *, alone):
        total = Partial()
        for number, batch in enumerate(batches):
            if number == 2 and not alone:
                raise UnaccountableRowsError("rows")
            total = total.combine(Partial({"w": batch.indices.sum()[None].double()}, {"examples": len(batch.indices)}))
        return total


def test_what_begins_anew_sees_every_example_once(build):
    task = build("bert")
    measurement = Measurement(Late(StatisticSettings(batch_size=1)), task, "train", task.load_model())
    for pair in ((0, 2), (2, 5), (5, 7)):
        measurement.add(*pair)
    assert measurement.partial().counts == {"examples": 7}
    assert measurement.partial().sums["w"].item() == sum(range(7))
    read_once = Late(StatisticSettings(batch_size=1)).measure(None, task, task.batches("train", 0, 7, 1))
    assert read_once.sums["w"].item() == sum(range(7))


def test_an_error_is_the_statistic_s_own_and_the_next_shard_begins_anew(build):
    task = build("bert")
    measurement = Measurement(gram(), task, "train", task.load_model())
    logits = task.logits
    task.logits = lambda *arguments: (_ for _ in ()).throw(StatisticsError("no logits today"))
    with pytest.raises(StatisticsError, match="no logits today"):
        measurement.add(0, 2)
    task.logits = logits
    measurement.add(0, 2)
    assert measurement.partial().counts["examples"] == 2


def test_blocks_from_several_make_the_file_that_the_whole_makes(build, tmp_path, monkeypatch):
    monkeypatch.setattr("merging.statistics.statistics_file.BLOCK_BYTES", 1 << 12)
    task = build("bert")
    parts = []
    for pair in ((0, 3), (3, 7)):
        measurement = Measurement(gram(), task, "train", task.load_model())
        measurement.add(*pair)
        parts.append(measurement.partial())
    outline = parts[0].outline().combine(parts[1].outline())
    assert all(value.device.type == "meta" for value in outline.sums.values())
    blocks = outline.blocks(1 << 12)
    assert max(len(block) for block in blocks) > 1 < max(start for block in blocks for _, start, _ in block)
    sums = ({n: v + parts[1].block(block)[n] for n, v in parts[0].block(block).items()} for block in blocks)
    names = {"checkpoint": "c", "data": "d"}
    spread = save_blocks(str(tmp_path / "spread"), gram(), outline, sums, **names)
    whole = save(str(tmp_path / "whole"), gram(), parts[0].combine(parts[1]), **names)
    assert spread.names == whole.names
    assert (spread.shared, spread.examples, spread.tokens) == (whole.shared, 7, whole.tokens)
    assert all(torch.equal(spread.read(name), whole.read(name)) for name in whole.names)


def test_experts_keep_their_own_counts_in_blocks():
    sums = torch.arange(12.0).reshape(3, 2, 2)
    partial = Partial({"e": sums}, {"examples": 9, "tokens": 9, "e[0]": 2, "e[1]": 0, "e[2]": 5})
    blocks = partial.blocks(16)
    assert blocks == [(("e", 0, 1),), (("e", 1, 2),), (("e", 2, 3),)]
    result = [gram().finalize(partial.of_block(block, partial.block(block)))["e"] for block in blocks]
    assert torch.equal(torch.cat(result), sums / torch.tensor([2.0, 1.0, 5.0])[:, None, None])


def test_what_is_nan_leaves_no_file(tmp_path):
    partial = Partial({"w": torch.tensor([1.0, float("nan")])}, {"examples": 1, "tokens": 1})
    with pytest.raises(StatisticsError, match="'w' holds NaN"):
        save(str(tmp_path / "x"), gram(), partial, checkpoint="c", data="d")
    assert not list(tmp_path.iterdir())


def test_a_statistic_that_changes_shapes_is_refused(tmp_path):
    class Flat(Gram):
        def finalize(self, partial):
            return {name: value.flatten() for name, value in super().finalize(partial).items()}

    partial = Partial({"w": torch.eye(2)}, {"examples": 1, "tokens": 1})
    with pytest.raises(StatisticsError, match="changed the shape"):
        save(str(tmp_path / "x"), Flat(StatisticSettings()), partial, checkpoint="c", data="d")


def test_files_of_a_scalar_and_of_nothing_are_read(tmp_path):
    sums = {"scale": torch.tensor(4.0), "none": torch.zeros(0, 3), "w": torch.ones(2, 3)}
    partial = Partial(sums, {"examples": 2, "tokens": 2})
    save(str(tmp_path / "x"), gram(), partial, checkpoint="c", data="d")
    file = StatisticsFile.open(str(tmp_path / "x"))
    assert {name: file.shape(name) for name in file.names} == {"scale": (), "none": (0, 3), "w": (2, 3)}
