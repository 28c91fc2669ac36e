import threading
from functools import partial

import pytest
import torch
from torch import nn

from merging.errors import MethodError
from merging.propagation.paused_forward import HookPoint, Stream


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 2))


def batches():
    return [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_every_pass_stands_at_every_stop_and_sees_what_was_overwritten():
    model, plain = chain(), chain()
    stream = Stream(model, [partial(model, x) for x in batches()], ["0", "2", "3"], [HookPoint("1", True, 0)])
    for stop, x in zip(stream.advance(), batches(), strict=True):
        assert torch.equal(stop.input, x)
        assert not stop.kept
    with torch.no_grad():
        model[0].weight.mul_(2)
        plain[0].weight.mul_(2)
        for stop, x in zip(stream.advance(), batches(), strict=True):
            torch.testing.assert_close(stop.input, plain[:2](x))
            assert torch.equal(stop.kept[HookPoint("1", True, 0)], stop.input)
        model[2].bias.add_(1)
        plain[2].bias.add_(1)
        for stop, x in zip(stream.advance(), batches(), strict=True):
            torch.testing.assert_close(stop.input, plain[:3](x))
    stream.close()


def test_what_enters_a_stop_is_kept_there():
    model = chain()
    stream = Stream(model, [partial(model, x) for x in batches()], ["2"], [HookPoint("2", False, 0)])
    stops = list(stream.advance())
    stream.close()
    assert len(stops) == 3
    stream = Stream(model, [partial(model, x) for x in batches()], ["2"], [HookPoint("2", False, 0)])
    assert all(stop.kept[HookPoint("2", False, 0)] is stop.input for stop in stream.advance())
    stream.close()


def test_closing_leaves_no_threads_and_no_hooks():
    model = chain()
    before = threading.active_count()
    stream = Stream(model, [partial(model, x) for x in batches()], ["0", "2"], [HookPoint("1", True, 0)])
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


def test_a_pass_that_takes_another_way_is_refused():
    class Forked(nn.Sequential):
        def forward(self, x, short):
            return self[1](x) if short else self[1](self[0](x))

    model = Forked(nn.Linear(2, 2), nn.Linear(2, 2))
    runs = [partial(model, batches()[0], short) for short in (False, True)]
    stream = Stream(model, runs, ["0", "1"], [])
    with pytest.raises(MethodError, match="came to '1' where '0' was expected"):
        list(stream.advance())
    stream.close()
    stream = Stream(model, runs[1:], ["1", "0"], [])
    list(stream.advance())
    with pytest.raises(MethodError, match="came to its end where '0' was expected"):
        list(stream.advance())
    stream.close()
