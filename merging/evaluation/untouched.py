"""Whether somebody else's function left a live model as it was."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Contents:
    """What stands in a model's memory at one time; every weight is read once, now and when it is asked about.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sums = [(name, value.detach(), _sum_of_bits(value)) for name, value in _tensors(model)]

    def written(self) -> list[str]:
        """Parameters and buffers whose memory holds something else now, wherever they may lie by now."""
        return [name for name, memory, before in self._sums if _sum_of_bits(memory) != before]


def structure(model: nn.Module) -> tuple[Any, ...]:
    """All that `half`, `to`, `train`, `compile`, hooks and exchanged parts change; no weight is read."""
    modules = tuple(
        (
            path,
            id(module),
            module.training,
            "forward" in module.__dict__,
            module.__dict__.get("_compiled_call_impl") is not None,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for path, module in model.named_modules()
    )
    tensors = tuple(
        (name, value.data_ptr(), value.dtype, value.device, value.shape, value.stride(), value.requires_grad)
        for name, value in _tensors(model)
    )
    config: Any = getattr(model, "config", None)
    return modules, tensors, repr(config.to_dict()) if hasattr(config, "to_dict") else None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that belong to a checkpoint: others are caches that a model renews as it runs."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True)
    yield from ((name, value) for name, value in model.named_buffers() if name in kept)


def _sum_of_bits(value: Tensor) -> int:
    words = value.detach().reshape(-1).view(torch.uint8)
    if value.element_size() % 4 == 0:
        words = words.view(torch.int32)
    return int(words.sum(dtype=torch.int64))
