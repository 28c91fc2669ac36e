"""Convolutions as linear layers: what a kernel sees at each place is a row, and its group of outputs is a matrix times it."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a plain convolution over one or two dimensions; subclasses that compute something else are none."""
    return type(module).forward in (nn.Conv2d.forward, nn.Conv1d.forward)


def patches(module: Any, value: Tensor) -> Tensor:
    """What a convolution's kernel sees, place by place and group by group, with stride, padding and dilation.

    Args:
        module: An `nn.Conv2d` or `nn.Conv1d`.
        value: Its input [N, C, H, W], or [N, C, L].

    Returns:
        [N, places, groups, C/groups · kernel], the last dimension in the order of the weight's.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(value, module._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if padded.dim() == 3:
        padded = padded.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    columns = F.unfold(padded, kernel, dilation, 0, stride)
    return columns.view(len(columns), module.groups, -1, columns.shape[2]).movedim(3, 1)


def by_place(module: Any, output: Tensor) -> Tensor:
    """A convolution's output, or its gradient, as [N, places, groups, outputs/groups]."""
    rows = output.flatten(2)
    return rows.view(len(rows), module.groups, -1, rows.shape[2]).movedim(3, 1)


def rows_read(layer: nn.Module, value: Tensor) -> Tensor:
    """What a linear layer reads, one row for each product with its weight: […, in], or […, groups, in] of a convolution."""
    if not is_convolution(layer):
        return value
    rows = patches(layer, value)
    return rows.squeeze(2) if rows.shape[2] == 1 else rows


def rows_written(layer: nn.Module, output: Tensor) -> Tensor:
    """What it puts out, in the same rows: […, out], or […, groups, out]."""
    if not is_convolution(layer):
        return output
    rows = by_place(layer, output)
    return rows.squeeze(2) if rows.shape[2] == 1 else rows


def geometry(layer: Any) -> tuple[Any, ...]:
    """What, beside its input, decides what a layer's rows are: two that share an input share rows only if this is the same."""
    if not is_convolution(layer):
        return ()
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def row_dimensions(layer: nn.Module) -> int:
    """How many of the last dimensions belong to a row."""
    return 2 if is_convolution(layer) and getattr(layer, "groups", 1) > 1 else 1
