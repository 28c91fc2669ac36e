import numpy as np
import pytest

from merging.methods.task_vectors import random_masks

SIZE = 200_000


def numbers(seed=0, member="m", weight="w", start=0, stop=SIZE):
    return (
        random_masks.drawn(*random_masks.keys(seed, member, weight), start, stop).astype(np.float64)
        / random_masks.LEVELS
    )


def correlation(a, b):
    """In standard errors."""
    return float(np.corrcoef(a, b)[0, 1]) * len(a) ** 0.5


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_uniform_and_bits_even(seed):
    result = numbers(seed)
    counts = np.histogram(result, bins=256, range=(0, 1))[0]
    expected = SIZE / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * (2 * 255) ** 0.5
    bits = (result * random_masks.LEVELS).astype(np.int64)[:, None] >> np.arange(16) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / SIZE**0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1024, 65536])
def test_entries_know_nothing_of_one_another(lag):
    result = numbers()
    assert abs(correlation(result[:-lag], result[lag:])) < 5
    assert abs(correlation(result[:-lag] < 0.1, result[lag:] < 0.1)) < 5


def test_members_weights_and_seeds_know_nothing_of_one_another():
    plain = numbers()
    others = [numbers(seed=seed) for seed in range(1, 6)]
    others += [numbers(member=f"m{number}") for number in range(5)] + [
        numbers(weight=f"w{number}") for number in range(5)
    ]
    for other in others:
        assert abs(correlation(plain, other)) < 5
        assert abs(correlation(plain < 0.05, other < 0.05)) < 5


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (7, 1000), (8, 999), (2**33 - 5, 2**33 + 6)])
def test_a_chunk_has_the_whole_s_numbers(start, stop):
    first = start - start % 2
    assert np.array_equal(
        numbers(start=start, stop=stop), numbers(start=first, stop=stop + 3)[start - first :][: stop - start]
    )
    assert len(numbers(start=start, stop=stop)) == stop - start
