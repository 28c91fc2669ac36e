from dataclasses import replace

import pytest
import torch

from merging.methods import Weight


def ones(name="w", size=40_000):
    return [Weight(name, torch.zeros(size), {"a": torch.ones(size), "b": torch.ones(size)})]


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_it_drops_the_asked_share_and_keeps_the_expectation(drop, merge):
    merged = merge("dare", ones(), {"a": 1.0}, {"drop": drop})["w"]
    assert abs(float((merged == 0).float().mean()) - drop) < 0.02
    assert merged[merged != 0].unique().numel() == 1
    assert abs(float(merged.mean()) - 1) < 0.1


def test_masks_differ_by_seed_member_and_weight_and_by_nothing_else(merge):
    plain = merge("dare", ones(), {"a": 1.0})["w"] != 0
    assert torch.equal(plain, merge("dare", ones(), {"a": 0.2})["w"] != 0)
    assert torch.equal(plain, merge("dare", ones(), {"a": 1.0, "b": 0.0})["w"] != 0)
    others = (
        merge("dare", ones(), {"a": 1.0}, {"seed": 1})["w"],
        merge("dare", ones(), {"b": 1.0})["w"],
        merge("dare", ones("other"), {"a": 1.0})["other"],
    )
    for other in others:
        assert abs(float((plain == (other != 0)).float().mean()) - 0.5) < 0.02


def test_a_chunk_of_a_weight_has_the_whole_weight_s_mask(merge):
    whole = merge("dare", ones(size=1000), {"a": 1.0})["w"]
    for start, stop in ((0, 10), (10, 333), (333, 1000)):
        part = replace(ones(size=stop - start)[0], start=start)
        assert torch.equal(merge("dare", [part], {"a": 1.0})["w"], whole[start:stop])


def test_a_smaller_drop_keeps_what_a_larger_one_kept(merge):
    few = merge("dare", ones(), {"a": 1.0}, {"drop": 0.8})["w"] != 0
    many = merge("dare", ones(), {"a": 1.0}, {"drop": 0.3})["w"] != 0
    assert bool((many | ~few).all())
