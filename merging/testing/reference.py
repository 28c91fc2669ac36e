"""Statistics by their definitions: every example alone and unpadded, plain autograd, plain hooks. Slow, and obvious."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import checkpoint_names, conv1d, in_checkpoint
from merging.tasks.likelihood import Likelihood
from merging.tasks.task import IGNORED, Batch, Split, Task


@dataclass
class Sums:
    """What is summed over examples, by the checkpoint's names.

    Args:
        fisher: Σ_x Σ_c p(c|x) (∇ log p(c|x))², every parameter's.
        gram: Σ x xᵀ over what layers read; of several groups of a convolution [groups, in, in].
        output_gram: Σ p(c|x) g gᵀ over the gradients of log p(c|x) at what layers put out.
        rows: How many rows were summed in `gram`.
    """

    fisher: dict[str, Tensor] = field(default_factory=dict)
    gram: dict[str, Tensor] = field(default_factory=dict)
    output_gram: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


def brute_force(task: Task, split: Split = "train", stop: int | None = None) -> Sums:
    """A task's statistics in its model's own dtype, with the exact estimator, or with the labels of sequences in the data.

    Args:
        task: Gives logits.
        split: Which examples.
        stop: How many of them; by default all.
    """
    model: Any = task.load_model()
    likelihood = task.likelihood(model)
    stop = task.size(split) if stop is None else stop
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(value) for name, value in parameters.items()}
    layers, sums = _layers(model), Sums()
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def see(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        calls.append((layer, args[0], out))
        return out.clone()  # what follows may change its input in place

    handles = [layer.register_forward_hook(see) for layer in layers]
    for one in _alone(task, split, stop):
        calls.clear()
        logits = task.logits(model, one)
        seen = list(calls)
        for layer, value, _ in seen:
            rows = rows_read(layer, value.detach())
            _add(sums.gram, layers[layer], torch.einsum("ngi,ngj->gij", rows, rows))
            sums.rows[layers[layer]] = sums.rows.get(layers[layer], 0) + len(rows)
        for weight, log in _terms(likelihood, logits, one):
            wanted = [*parameters.values(), *(out for _, _, out in seen)]
            gradients = torch.autograd.grad(log, wanted, retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=False):
                if gradient is not None:
                    squares[name] += weight * gradient.square()
            for (layer, _, _), gradient in zip(seen, gradients[len(parameters) :], strict=True):
                if gradient is not None:
                    rows = rows_written(layer, gradient)
                    _add(sums.output_gram, layers[layer], weight * torch.einsum("ngi,ngj->gij", rows, rows))
    for handle in handles:
        handle.remove()
    sums.fisher = in_checkpoint(model, squares)
    for grams in (sums.gram, sums.output_gram):
        for name, value in grams.items():
            grams[name] = value[0] if len(value) == 1 else value
    return sums


def rows_read(layer: nn.Module, value: Tensor) -> Tensor:
    """What a layer reads, row by row and group by group [rows, groups, in]; of a convolution window by window."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return value.reshape(-1, 1, value.shape[-1])
    flat = isinstance(layer, nn.Conv1d)
    value = value.unsqueeze(2) if flat else value
    kernel, stride, dilation = (
        ((1, *given) if flat else given) for given in (layer.kernel_size, layer.stride, layer.dilation)
    )
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if layer.padding == "valid":
        sides = [0, 0]
    elif layer.padding == "same":
        sides = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    else:
        sides = [2 * int(one) for one in ((0, *layer.padding) if flat else layer.padding)]
    before = [side // 2 for side in sides]
    around = [before[1], sides[1] - before[1], before[0], sides[0] - before[0]]
    if flat and mode != "constant":  # other modes pad as many dimensions as they are given
        value = nn.functional.pad(value[:, :, 0], around[:2], mode=mode).unsqueeze(2)
    else:
        value = nn.functional.pad(value, around, mode=mode)
    rows = []
    for image in value:
        for top in range(0, image.shape[1] - dilation[0] * (kernel[0] - 1), stride[0]):
            for left in range(0, image.shape[2] - dilation[1] * (kernel[1] - 1), stride[1]):
                window = image[
                    :,
                    top : top + dilation[0] * (kernel[0] - 1) + 1 : dilation[0],
                    left : left + dilation[1] * (kernel[1] - 1) + 1 : dilation[1],
                ]
                rows.append(window.reshape(layer.groups, -1))
    return torch.stack(rows)


def rows_written(layer: nn.Module, value: Tensor) -> Tensor:
    """What a layer puts out, in the same rows [rows, groups, out]."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return value.reshape(-1, 1, value.shape[-1])
    rows = value.flatten(2).transpose(1, 2).reshape(-1, value.shape[1])
    return rows.reshape(len(rows), layer.groups, -1)


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """Linear layers and convolutions → the name of their weight; without weights that are embeddings', too."""
    names, kinds = checkpoint_names(model), nn.Linear | nn.Conv1d | nn.Conv2d | conv1d()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights: Mapping[nn.Module, Any] = {module: getattr(module, "weight", None) for module in model.modules()}
    return {
        module: names[id(weight)]
        for module, weight in weights.items()
        if isinstance(module, kinds) and id(weight) not in embeddings
    }


def _alone(task: Task, split: Split, stop: int) -> Iterator[Batch]:
    for place in range(stop):
        yield from task.batches(split, place, place + 1, 1)


def _terms(likelihood: Likelihood, logits: Tensor, one: Batch) -> list[tuple[float, Tensor]]:
    """Weights and functions of one example's logits whose squared gradients add up to its Fisher."""
    if logits.dim() == 3:
        labels = one.labels[0, : logits.shape[1]]
        real = labels != IGNORED
        return [(1.0, logits[0][real].log_softmax(-1).gather(1, labels[real, None]).sum())]
    if likelihood == "categorical":
        return [(float(log.detach().exp()), log) for log in logits.log_softmax(-1)[0]]
    if likelihood == "bernoulli":
        chances = logits.detach().sigmoid()[0]
        return [(float(p * (1 - p)), z) for p, z in zip(chances, logits[0], strict=True)]
    return [(1.0, z) for z in logits[0]]


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
