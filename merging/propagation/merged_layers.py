"""The linear layers of a live model whose weights are merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from merging.checkpoints.models.parameter_names import conv1d
from merging.statistics.capture.layers import layer_names
from merging.statistics.capture.patches import is_convolution


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Args:
        path: Its name in the model.
        weight: The base's name of its weight.
        bias: The base's name of its bias; None where it has none, or none that is merged.
        transposed: Its weight is stored [in, out].
    """

    path: str
    weight: str
    bias: str | None
    transposed: bool

    def output(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        """W x + b of rows [rows, in]."""
        return linear(rows, weight.mT if self.transposed else weight, bias)

    def outputs(self, out: Mapping[str, Tensor]) -> int:
        """How many numbers it puts out for a row."""
        return out[self.weight].shape[1 if self.transposed else 0]

    def add(self, delta: Tensor, out: Mapping[str, Tensor]) -> None:
        """Adds [in, out] to the merged weight, and the row below it to the merged bias."""
        weight = out[self.weight]
        inputs = weight.shape[0] if self.transposed else weight.shape[1]
        weight += delta[:inputs] if self.transposed else delta[:inputs].mT
        if self.bias:
            out[self.bias] += delta[inputs]


def merged_layers(model: nn.Module, out: Mapping[str, Tensor]) -> dict[str, Layer]:
    """By the base's name of its weight, every linear layer of a model that holds the tensors of `out`.

    A weight that is also an embedding's (a tied output layer) is left out: it is merged as an embedding. So is one that
    several layers hold, and a convolution's: these are the mean.
    """
    names = {(value.data_ptr(), value.numel()): name for name, value in out.items()}
    paths = {module: path for path, module in model.named_modules()}
    layers: dict[str, Layer] = {}
    twice = set()
    for module in layer_names(model):
        if is_convolution(module):
            continue
        weight = _name_of(module.weight, names)
        if weight is None:
            continue
        if weight in layers:
            twice.add(weight)
        bias = getattr(module, "bias", None)
        layers[weight] = Layer(
            paths[module],
            weight,
            None if bias is None else _name_of(bias, names),
            isinstance(module, conv1d()),
        )
    return {name: layer for name, layer in layers.items() if name not in twice}


def _name_of(value: Any, names: Mapping[tuple[int, int], str]) -> str | None:
    """Which tensor a parameter is, and no part of."""
    return names.get((value.data_ptr(), value.numel()))
