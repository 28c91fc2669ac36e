"""Whether what linear layers read in a batch is what single examples make them read, found by trying two examples."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import conv1d
from merging.errors import StatisticsError
from merging.statistics.capture.hooks import differentiable
from merging.statistics.capture.layers import decoder_layers, decoder_mask, real_rows
from merging.statistics.capture.modules import Logits
from merging.statistics.capture.patches import geometry, row_dimensions, rows_read, rows_written
from merging.statistics.capture.single_examples import padding_token, single_examples, unlike_pair
from merging.statistics.capture.verification import differs, probe_gradient
from merging.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class LinearCalls:
    """How a model's linear layers run.

    Args:
        decoding: The layers that run at the positions of an encoder–decoder's decoder.
        alone: Whether examples must run one at a time, without padding: some layer reads what is shared by the batch
            (DeBERTa's relative embeddings), or rows of which nobody can say whose they are (experts).
        holders: Weight's name → the first weight's whose layer is given the very same tensors in every call.
        incomplete: Names of weights that are also read outside of their layer's own calls.
        unlike: Names of weights whose rows in a batch are not those of its examples.
    """

    decoding: frozenset[nn.Module]
    alone: bool
    holders: Mapping[str, str]
    incomplete: frozenset[str]
    unlike: frozenset[str]

    def parts(self, batch: Batch, *, alone: bool) -> Iterator[Batch]:
        """What to run of a batch: all of it, or its examples one by one, where they must or are told to run `alone`."""
        return single_examples(batch, unpadded=True) if alone or self.alone else iter((batch,))


class UnaccountableRowsError(StatisticsError):
    """Rows of a batch's padding cannot be told from its examples' own: the examples must run alone."""


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear layer is called with."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def row_mask(batch: Batch, decoding: bool, rows: torch.Size) -> Tensor | None:
    """Which positions of a layer's input are real.

    Args:
        batch: What the model runs on.
        decoding: Whether the layer runs at the decoder's positions.
        rows: The input's extents but for those of a row. Where they are the labels' and not the mask's, the layer runs at
            positions of labels alone (an output layer that is spared the prompt).
    """
    if decoding:
        return decoder_mask(batch)
    if batch.is_sequential and batch.mask is not None and rows == batch.labels.shape != batch.mask.shape:
        return batch.labels != IGNORED
    return batch.mask


def accountable(value: Tensor, mask: Tensor | None, examples: int, dimensions: int = 1) -> bool:
    """Whether a layer's input holds a row for every position, or one an example, so that padding can be told."""
    if mask is None:
        return True
    rows = value.shape[: value.dim() - dimensions]
    if [extent for extent in rows if extent > 1] == [extent for extent in mask.shape if extent > 1]:
        return True
    return rows[: mask.dim()] == mask.shape or rows in ((mask.numel(),), (examples,), (examples, 1))


def real_mask(name: str, value: Tensor, batch: Batch, decoding: bool, dimensions: int = 1) -> Tensor | None:
    """Which rows of a layer's input are real, for `real_rows`.

    Raises:
        UnaccountableRowsError: There is padding, and nobody can say which rows it is.
    """
    mask = row_mask(batch, decoding, value.shape[: value.dim() - dimensions])
    if mask is None or bool(mask.all()) or accountable(value, mask, len(batch.indices), dimensions):
        return mask
    raise UnaccountableRowsError(
        f"'{name}' is given {list(value.shape)} for {list(mask.shape)} tokens, some of them padding, so that its real rows "
        "cannot be told: set the statistic's batch_size to 1"
    )


def inspect_calls(model: nn.Module, logits: Logits, layers: Mapping[nn.Module, str], batch: Batch) -> LinearCalls:
    """Runs two examples of a batch, one of them padded, together and alone, forward and once backward.

    Products Xᵀ(X r) with a fixed r must be the same of both, and Gᵀ(X r) must be the weight's gradient times r.

    Args:
        model: The model, in evaluation mode, on the batch's device.
        logits: Runs the model on a batch.
        layers: Layer → its weight's name.
        batch: The first batch.
    """
    decoding = decoder_layers(model, logits, layers, batch)
    pair = unlike_pair(batch, padding_token(model))
    together, alone = _Sketch(layers, decoding), _Sketch(layers, decoding)
    with differentiable(model, parameters=True), together.watching(pair):
        incomplete = _incomplete(logits(model, pair), layers, together)
    with torch.no_grad():
        for one in single_examples(pair, unpadded=True):
            with alone.watching(one):
                logits(model, one)
    unlike = set(together.unaccountable)
    for name in {*together.products, *alone.products}:
        first, second = together.products.get(name), alone.products.get(name)
        if first is None or second is None or together.rows[name] != alone.rows[name] or differs(first, second):
            unlike.add(name)
    holders = together.holders(incomplete)
    if len(batch.indices) > 1:
        holders = {name: holder for name, holder in holders.items() if alone.holders(incomplete).get(name) == holder}
    return LinearCalls(
        frozenset(decoding),
        len(batch.indices) == 1 or bool(unlike),
        holders,
        incomplete,
        frozenset(unlike),
    )


@dataclass
class _Sketch:
    """What layers read, by products with a fixed vector."""

    layers: Mapping[nn.Module, str]
    decoding: Collection[nn.Module]
    products: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    unaccountable: set[str] = field(default_factory=set)
    _inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _vectors: dict[int, Tensor] = field(default_factory=dict)

    def vector(self, like: Tensor, extent: int) -> Tensor:
        """The vector of an extent."""
        if extent not in self._vectors:
            drawn = torch.randn(extent, generator=torch.Generator().manual_seed(extent), dtype=torch.float64)
            self._vectors[extent] = drawn.to(like)
        return self._vectors[extent]

    def holders(self, without: Collection[str] = ()) -> dict[str, str]:
        """Weight's name → the first whose layer reads the same rows of the same tensors; of those that share."""
        first: dict[tuple[Any, ...], str] = {}
        holders = {}
        geometries = {name: geometry(layer) for layer, name in self.layers.items()}
        for name, inputs in self._inputs.items():
            if name in without:
                continue
            holder = first.setdefault((geometries[name], *map(id, inputs)), name)
            if holder != name:
                holders[name] = holder
        return holders

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Sees the layers' calls."""

        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            value, name = given(args, kwargs), self.layers[layer]
            dimensions = row_dimensions(layer)
            self._inputs[name].append(value)
            value = rows_read(layer, value.detach())
            mask = row_mask(batch, layer in self.decoding, value.shape[: value.dim() - dimensions])
            if not accountable(value, mask, len(batch.indices), dimensions):
                self.unaccountable.add(name)
            every = value.reshape(-1, *value.shape[value.dim() - dimensions :])
            vector = self.vector(every, every.shape[-1])
            rows = real_rows(value, mask, dimensions)
            product = torch.einsum("n...i,n...->...i", rows, rows @ vector)
            self.products[name] = self.products.get(name, 0) + product
            self.rows[name] += len(rows)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return output  # one that gives more than its product is found to be incomplete
            seen = every @ vector
            written = partial(rows_written, layer)
            output.register_hook(lambda gradient: self._backward(name, written(gradient), seen))  # type: ignore[no-untyped-call]
            # What follows may change its input in place, and would lose the hook.
            return output.clone()

        handles = [layer.register_forward_hook(see, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _backward(self, name: str, gradient: Tensor, product: Tensor) -> None:
        rows = gradient.reshape(*product.shape, gradient.shape[-1])
        sketch = torch.einsum("n...o,n...->...o", rows, product).flatten()
        self.gradients[name] = self.gradients.get(name, 0) + sketch


def _incomplete(output: Tensor, layers: Mapping[nn.Module, str], seen: _Sketch) -> frozenset[str]:
    """The weights whose gradient is not what their layers' calls make it; one weight's gradient is held at a time."""
    if not output.requires_grad:
        return frozenset()
    true: dict[str, Tensor] = {}
    weights: dict[int, tuple[Any, str]] = {id(layer.weight): (layer, name) for layer, name in layers.items()}
    handles = []
    for layer, name in weights.values():

        def reduce(weight: Tensor, layer: nn.Module = layer, name: str = name) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            matrix = gradient.T if isinstance(layer, conv1d()) else gradient.flatten(1)
            true[name] = matrix @ seen.vector(matrix, matrix.shape[1])

        handles.append(layer.weight.register_post_accumulate_grad_hook(reduce))
    try:
        torch.autograd.backward(output, probe_gradient(output), inputs=[layer.weight for layer, _ in weights.values()])
    finally:
        for handle in handles:
            handle.remove()
    largest = max((float(value.norm()) for value in true.values()), default=0.0)
    return frozenset(
        name
        for name, value in true.items()
        if differs(seen.gradients.get(name, torch.zeros_like(value)), value, largest)
    )
