from collections import Counter

import pytest
import torch
from torch import nn

from merging.propagation.paused_forward import HookPoint, Stream
from merging.propagation.repeated_passes import RepeatedPasses

STOPS = ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.2.a", "blocks.2.b", "head"]
NO_PLACES = [[] for _ in STOPS]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.runs = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.runs += 1
        x += 1.0  # overwrites what it is given, as some models do
        return x + self.b(torch.relu(self.a(x)))


class Blocks(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head, self.way = nn.ModuleList(Block() for _ in range(3)), nn.Linear(4, 2), way

    def forward(self, x):
        states = [x.clone()]
        for block in self.blocks:
            states.append(block(states[-1].clone()))
        if self.way == "from the first":
            return self.head(states[-1] + states[1])
        return self.head(states[-1])


def batches():
    return torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).unbind()


def seen(passes, stops):
    return [[stop.input.clone() for stop in passes.advance()] for _ in stops]


@pytest.mark.parametrize("way", ["one after another", "from the first"])
def test_what_is_seen_at_the_stops_is_that_of_passes_which_pause(way):
    with torch.no_grad():
        model = Blocks(way)
        runs = [lambda x=x: model(x) for x in batches()]
        paused = Stream(model, runs, STOPS, [])
        wanted = seen(paused, STOPS)
        paused.close()
        repeated = RepeatedPasses(model, runs, STOPS, NO_PLACES)
        result = seen(repeated, STOPS)
        repeated.close()
    assert all(torch.equal(a, b) for x, y in zip(wanted, result, strict=True) for a, b in zip(x, y, strict=True))
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize(
    ("way", "expected"),
    [("one after another", (3, 2, 3)), ("from the first", (6, 4, 3))],
    ids=["left out", "run again"],
)
def test_finished_blocks_run_no_more(way, expected):
    with torch.no_grad():
        model = Blocks(way)
        passes = RepeatedPasses(model, [lambda x=x: model(x) for x in batches()], STOPS, NO_PLACES)
        for block in model.blocks:
            block.runs = 0
        seen(passes, STOPS)
        passes.close()
    # to each of its own stops, and once more to its end; to every later stop where its output is read at the end, too
    assert tuple(block.runs / 5 for block in model.blocks) == expected


def test_a_block_with_a_place_that_is_looked_at_later_runs_until_then():
    place = HookPoint("blocks.0.a", True, 0)
    with torch.no_grad():
        model = Blocks("one after another")
        runs = [lambda x=x: model(x) for x in batches()]
        passes = RepeatedPasses(model, runs, STOPS, [[], [], [], [place], [], []])
        kept = Counter()
        for number, _ in enumerate(STOPS):
            for stop in passes.advance():
                kept[number] += place in stop.kept
        passes.close()
    assert kept[3] == 5
