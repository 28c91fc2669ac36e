import threading
from functools import partial

import pytest
import torch
from torch import nn

from merging.propagation.walk import Place, Stream


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 2))


def batches():
    return [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_every_pass_stands_at_every_stop_and_sees_what_was_overwritten():
    model = chain()
    stream = Stream(model, [partial(model, x) for x in batches()], ["0", "2", "3"], [Place("1", True, 0)])
    for stop, x in zip(stream.advance(), batches(), strict=True):
        assert torch.equal(stop.input, x)
        assert not stop.kept
    with torch.no_grad():
        model[0].weight.mul_(2)
        for stop, x in zip(stream.advance(), batches(), strict=True):
            torch.testing.assert_close(stop.input, model[:2](x))
            assert torch.equal(stop.kept[Place("1", True, 0)], stop.input)
        model[2].bias.add_(1)
        for stop, x in zip(stream.advance(), batches(), strict=True):
            torch.testing.assert_close(stop.input, model[:3](x))
    stream.close()


def test_what_enters_a_stop_is_kept_there():
    model = chain()
    stream = Stream(model, [partial(model, x) for x in batches()], ["2"], [Place("2", False, 0)])
    stops = list(stream.advance())
    stream.close()
    assert len(stops) == 3
    stream = Stream(model, [partial(model, x) for x in batches()], ["2"], [Place("2", False, 0)])
    assert all(stop.kept[Place("2", False, 0)] is stop.input for stop in stream.advance())
    stream.close()


def test_closing_leaves_no_threads_and_no_hooks():
    model = chain()
    before = threading.active_count()
    stream = Stream(model, [partial(model, x) for x in batches()], ["0", "2"], [Place("1", True, 0)])
    next(iter(stream.advance()))
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_within_a_pass_is_raised_where_it_is_led():
    model = chain()
    stream = Stream(model, [partial(model, torch.randn(3, 5))], ["0", "2"], [])
    list(stream.advance())
    with pytest.raises(RuntimeError, match="shapes"):
        list(stream.advance())
    stream.close()


def test_a_pass_that_ends_too_early_is_told():
    model = chain()
    stream = Stream(model, [partial(model, batches()[0])], ["3"], [])
    list(stream.advance())
    with pytest.raises(RuntimeError, match="another way"):
        list(stream.advance())
    stream.close()
