"""Batches taken apart: single examples, as they are or without their padding."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from merging.tasks.task import Batch


def single_examples(batch: Batch, *, unpadded: bool = False) -> Iterator[Batch]:
    """A batch's examples, one by one; inputs that hold no row an example go with each of them.

    Args:
        batch: N examples.
        unpadded: Cut what has the mask's extents behind each example's last real token.
    """
    for number in range(len(batch.indices)):
        one = _some(batch, slice(number, number + 1))
        yield _unpadded(one) if unpadded else one


def _some(batch: Batch, places: slice | list[int]) -> Batch:
    """Some of a batch's examples, with all inputs that hold no row an example."""
    count = len(batch.indices)
    inputs = {name: value[places] if value.shape[:1] == (count,) else value for name, value in batch.inputs.items()}
    mask = None if batch.mask is None else batch.mask[places]
    return Batch(inputs, batch.labels[places], batch.indices[places], mask)


def padding_token(model: nn.Module) -> int:
    """The token that a model's configuration takes for padding; 0 where it names none."""
    token = getattr(getattr(model, "config", None), "pad_token_id", None)
    return token if isinstance(token, int) else 0


def unlike_pair(batch: Batch, pad: int = 0) -> Batch:
    """The batch's shortest and longest example, so that one of them has padding; all of it, where it is one example.

    Where all are equally long, the first loses its last token, if it has more than three and none has a label.

    Args:
        batch: N examples.
        pad: The token that takes the lost one's place.
    """
    count = len(batch.indices)
    if count == 1:
        return batch
    places = [0, 1]
    if batch.mask is not None:
        lengths = batch.mask.reshape(count, -1).sum(1)
        places = [int(lengths.argmin()), int(lengths.argmax())]
        if places[0] == places[1]:
            places = [0, 1]
    return _shortened(_some(batch, places), pad)


def _shortened(pair: Batch, pad: int) -> Batch:
    mask = pair.mask
    if mask is None or mask.dim() != 2 or not bool(mask.all()) or mask.shape[1] < 4 or pair.is_sequential:
        return pair
    shorter = mask.clone()
    shorter[0, -1] = False
    inputs = {}
    for name, value in pair.inputs.items():
        if value.shape == mask.shape and torch.equal(value.bool(), mask.bool()):
            value = value.clone()
            value[0, -1] = 0
        elif value.shape == mask.shape and name == "input_ids":
            value = value.clone()
            value[0, -1] = pad
        inputs[name] = value
    if not any(torch.equal(value.bool(), shorter.bool()) for value in inputs.values() if value.shape == mask.shape):
        return pair
    return Batch(inputs, pair.labels, pair.indices, shorter)


def _unpadded(one: Batch) -> Batch:
    if one.mask is None or one.mask.dim() != 2 or not bool(one.mask.any()):
        return one
    shape = one.mask.shape
    width = int(one.mask[0].nonzero()[-1]) + 1

    def cut(value: Tensor) -> Tensor:
        return value[:, :width] if value.shape[:2] == shape else value

    inputs = {name: value if name.startswith("decoder_") else cut(value) for name, value in one.inputs.items()}
    is_cut = one.is_sequential and "decoder_input_ids" not in inputs
    labels = cut(one.labels) if is_cut else one.labels
    return Batch(inputs, labels, one.indices, cut(one.mask))
