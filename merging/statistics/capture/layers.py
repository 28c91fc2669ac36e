"""What the statistics share: a model's linear layers, which rows are real tokens, sums and means."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import checkpoint_names, conv1d, saved_names
from merging.errors import StatisticsError
from merging.statistics.capture.modules import Logits, first_example
from merging.statistics.capture.patches import is_convolution
from merging.statistics.statistic import Partial
from merging.tasks.task import IGNORED, Batch


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def layer_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every `nn.Linear`, `Conv1D` and convolution → the name of its weight in the checkpoint.

    A weight that is also an embedding's (a tied output layer) is left out: it is merged as an embedding.
    """
    names, linear = checkpoint_names(model), nn.Linear | conv1d()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        module: names[id(module.weight)]
        for module in model.modules()
        if (isinstance(module, linear) or is_convolution(module))
        and id(module.weight) in names
        and id(module.weight) not in embeddings
    }


def transposed_names(layers: Mapping[nn.Module, str]) -> tuple[str, ...]:
    """Names of the weights that are stored [in, out], as `Conv1D` does."""
    return tuple(sorted({name for layer, name in layers.items() if isinstance(layer, conv1d())}))


def uncovered(model: nn.Module, covered: Collection[str]) -> tuple[str, ...]:
    """Names, in the checkpoint, of a model's matrices that are not among the covered ones and are no embeddings.

    Of joined experts, all the names that they are saved under.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = checkpoint_names(model)
    left = [
        own
        for own, parameter in model.named_parameters()
        if parameter.dim() > 1
        and parameter.shape[0] > 1
        and id(parameter) not in embeddings
        and names[id(parameter)] not in covered
    ]
    return tuple(sorted({name for own in left for name in saved_names(model, own)} - set(covered)))


def token_count(batch: Batch) -> int:
    """Real tokens of a batch; without a mask, its targets, or examples where these are no class indices."""
    if batch.mask is not None:
        return int(batch.mask.sum())
    return len(batch.labels) if batch.labels.is_floating_point() else int((batch.labels != IGNORED).sum())


def real_rows(value: Tensor, mask: Tensor | None, dimensions: int = 1) -> Tensor:
    """[…, D] as [rows, D] without padding; all rows where these are no positions of the mask.

    Args:
        value: The tensor.
        mask: Which positions are real, or None.
        dimensions: How many of the last dimensions a row has.
    """
    rows = value.reshape(-1, *value.shape[value.dim() - dimensions :])
    if mask is None or mask.numel() != len(rows) or bool(mask.all()):
        return rows
    return rows[mask.reshape(-1).bool()]


def decoder_layers(model: nn.Module, logits: Logits, layers: Mapping[nn.Module, str], batch: Batch) -> set[nn.Module]:
    """The layers of an encoder–decoder that run at the decoder's positions: those that its ids change."""
    if "decoder_input_ids" not in batch.inputs:
        return set()
    one = first_example(batch, 1)
    ids = one.inputs["decoder_input_ids"]
    other = {**one.inputs, "decoder_input_ids": torch.where(ids == 0, 1, 0)}
    seen: dict[nn.Module, Tensor] = {}
    changed: set[nn.Module] = set()

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0]

    def compare(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.equal(seen[module], args[0]):
            changed.add(module)

    for hook, inputs in ((remember, one.inputs), (compare, other)):
        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
        try:
            with torch.no_grad():
                logits(model, Batch(inputs, one.labels, one.indices, one.mask))
        finally:
            for handle in handles:
                handle.remove()
    return changed


def decoder_mask(batch: Batch) -> Tensor:
    """Which of the decoder's positions are real [N, S]."""
    return batch.inputs.get("decoder_attention_mask", batch.labels != IGNORED)


def means(kind: str, partial: Partial) -> dict[str, Tensor]:
    """Sums over what they are sums over (their own count, or the examples), in float32.

    Raises:
        StatisticsError: It was computed over no examples, or holds NaN or Inf.
    """
    examples = partial.counts.get("examples", 0)
    if not examples:
        raise StatisticsError(f"the {kind} was computed over no examples: give its task's split some")
    result = {
        name: (value / _count(partial, name, value, examples)).to(torch.float32) for name, value in partial.sums.items()
    }
    if bad := [name for name, value in result.items() if not value.isfinite().all()]:
        raise StatisticsError(
            f"the {kind} of '{bad[0]}' holds NaN or Inf: the member's weights or "
            "its task's examples make its output overflow; measure in float32, or leave the member out"
        )
    return result


def _count(partial: Partial, name: str, value: Tensor, examples: int) -> Tensor | int:
    """What a sum is over; of experts each its own number of rows. Over no row it is 0, and stays 0."""
    if f"{name}[0]" in partial.counts:
        counts = [max(1, partial.counts[f"{name}[{expert}]"]) for expert in range(len(value))]
        return torch.tensor(counts, dtype=value.dtype)[:, None, None]
    return max(1, partial.counts.get(name, examples))
