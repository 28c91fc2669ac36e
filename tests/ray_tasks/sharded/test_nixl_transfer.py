"""Weights are written straight into another agent's memory, or it is said that they were not."""

import sys
from dataclasses import replace

import pytest
import torch

from merging.errors import ClusterError
from ray_tasks.sharded.nixl_transfer import BUFFERS, ReceiveBuffers, UnreachableError, Writer


def test_without_nixl_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(ClusterError, match=r"there is no NIXL .*pip install 'mergequest\[nixl\]'"):
        ReceiveBuffers([3])


@pytest.fixture
def values():
    return torch.randn(1000)


def test_every_turn_lies_in_its_tray_until_that_is_used_again(values):
    pytest.importorskip("nixl", reason="needs mergequest[nixl]")
    buffers, writers = ReceiveBuffers([4 * 1000, 4 * 7]), []
    for shard, own in enumerate((values, torch.arange(7.0))):
        writers.append((own, Writer(own, shard)))
    for turn in range(2 * BUFFERS):
        for own, writer in writers:
            own += 1
            writer.write(buffers.address, turn)
        if turn:
            for shard, (own, _) in enumerate(writers):
                assert torch.equal(buffers.part(shard, turn).view(own.dtype), own)
                assert torch.equal(buffers.part(shard, turn - 1).view(own.dtype) + 1, own)


def test_what_comes_too_late_or_cannot_arrive_is_refused(values):
    pytest.importorskip("nixl", reason="needs mergequest[nixl]")
    buffers, writer = ReceiveBuffers([4 * 1000]), Writer(values, 0)
    writer.write(buffers.address, 5)
    kept = values.clone()
    values.zero_()
    with pytest.raises(RuntimeError, match="turn 3 came after turn 5"):
        writer.write(buffers.address, 3)
    assert torch.equal(buffers.part(0, 5).view(kept.dtype), kept)

    nowhere = replace(buffers.address, name="nobody", agent=b"nonsense")
    for why in ("nixl", "an earlier write to it failed"):
        with pytest.raises(UnreachableError, match=why):
            writer.write(nowhere, 0)
    writer.write(buffers.address, 6)
    assert not buffers.part(0, 6).any()
