import numpy as np
import pytest

from merging.optimization.schedule import Schedule, bucketed, parted


@pytest.mark.parametrize("batch", [1, 5, 12, 64])
def test_every_pass_has_every_example_once(batch):
    places = [np.arange(3, 40), np.arange(0, 11), np.array([5])]
    lengths = [np.arange(len(own)) % 7 for own in places]
    schedule = Schedule(places, lengths, batch, 3)
    count = schedule.steps_a_pass
    for number in range(3):
        steps = [schedule.step(number * count + at) for at in range(count)]
        for task, own in enumerate(places):
            seen = np.concatenate([step[task] for step in steps])
            assert sorted(seen.tolist()) == own.tolist()
        sizes = [sum(map(len, step)) for step in steps]
        assert max(sizes) <= batch + 3
    first, second = (np.concatenate([schedule.step(n * count + at)[0] for at in range(count)]) for n in (0, 1))
    assert batch == 64 or first.tolist() != second.tolist()


def test_parts_are_neighbours_and_nearly_equal():
    units = [np.arange(5), np.arange(0), np.arange(4)]
    cut = [list(parted(units, part, 4)) for part in range(4)]
    assert sorted(sum(len(places) for _, places in part) for part in cut) == [2, 2, 2, 3]
    joined = [(number, place) for part in cut for number, places in part for place in places]
    assert joined == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_bucketed_takes_each_example_once_and_saves_padding():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, size=1000)
    batches = bucketed(lengths, 16, generator)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert max(len(batch) for batch in batches) == 16
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.15 * lengths.sum()
    firsts = [lengths[batch].mean() for batch in batches]
    assert firsts != sorted(firsts)
