import pytest
import torch

from merging.propagation.used_positions import ALL, UsedPositions, used_rows

RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
LEFT = RIGHT.flip(1)


def gradient(positions):
    """A gradient [3, 4, 2] that is not zero at one position of each example."""
    value = torch.zeros(3, 4, 2)
    for example, position in enumerate(positions):
        value[example, position, 1] = 1e-9
    return value


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ((0, 0, 0), RIGHT, UsedPositions((0,))),
        ((3, 1, 2), RIGHT, UsedPositions((0,), from_end=True)),
        ((3, 3, 3), LEFT, UsedPositions((0,), from_end=True)),
        ((0, 2, 1), LEFT, UsedPositions((0,))),
        ((2, 0, 1), RIGHT, UsedPositions((1,), from_end=True)),
        ((3, 0, 1), RIGHT, ALL),
        ((1, 1, 1), None, UsedPositions((1,))),
    ],
)
def test_the_rule_behind_the_positions(positions, mask, expected):
    assert used_rows(gradient(positions), mask) == expected


def test_what_has_no_positions_counts_whole():
    assert used_rows(None, RIGHT) == ALL
    assert used_rows(torch.ones(3, 2), RIGHT) == ALL
    assert used_rows(torch.ones(3, 4, 2), RIGHT) == ALL
    assert used_rows(torch.zeros(3, 4, 2), None) == ALL


def test_rows_are_taken_by_rank():
    value = torch.arange(24.0).reshape(3, 4, 2)
    assert torch.equal(UsedPositions((0,)).take(value, LEFT), torch.stack([value[0, 0], value[1, 2], value[2, 1]]))
    last = UsedPositions((0,), from_end=True)
    assert torch.equal(last.take(value, RIGHT), torch.stack([value[0, 3], value[1, 1], value[2, 2]]))
    assert torch.equal(ALL.take(value, RIGHT), value[RIGHT.bool()])
    assert torch.equal(UsedPositions((0,)).take(value, None), value[:, 0])
