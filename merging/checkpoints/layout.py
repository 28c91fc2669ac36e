"""Which matrices of a checkpoint are stored [in, out]: those of GPT-2's `Conv1D`, and of some joined experts."""

from collections.abc import Mapping, Sequence

from torch import nn

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.parameter_names import conv1d
from merging.errors import CheckpointError

ALIKE = "choose a method that treats outputs and inputs alike (iso_c, tsv_m, task_arithmetic)"
"""The remedy where nobody knows which they are."""


def transposed_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the matrices, and of weights that join experts, that are stored [in, out].

    A bias has an entry for each output. Where each matrix that has a bias and is not square has as many rows, all are
    [out, in] and no model is built; otherwise it is asked for its `Conv1D` modules. Experts say how they are stored
    (`is_transposed`).

    Raises:
        CheckpointError: Some are, and transformers cannot build the model that tells which; or a module of experts does not
            tell.
    """
    experts = [
        name
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 3 and min(info.shape) > 1 and "conv" not in name
    ]
    if not experts and not any(_is_turned(checkpoint, name) for name in checkpoint.tensors):
        return frozenset()
    try:
        model = skeleton.build(checkpoint.path, checkpoint.config, checkpoint.architecture)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Some of its matrices may be stored [in, out], and only the model tells which: {ALIKE}"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    live = skeleton.live_names(model, checkpoint.tensors)
    turned = {name for name, own in live.items() if isinstance(modules.get(own.removesuffix(".weight")), conv1d())}
    return frozenset(turned | _turned_experts(checkpoint, experts, live, modules))


def _turned_experts(
    checkpoint: Checkpoint, experts: Sequence[str], live: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> set[str]:
    """Those of the three-dimensional weights that their module says are stored [experts, in, out]."""
    turned = set()
    for name in experts:
        module = modules.get(live.get(name, "").rpartition(".")[0])
        if module is None or isinstance(module, nn.modules.conv._ConvNd):
            continue
        transposed = getattr(module, "is_transposed", None)
        if transposed is None:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' {list(checkpoint.tensors[name].shape)} joins the experts of "
                f"{type(module).__name__}, and whether each is stored [out, in] or [in, out] only its code tells: {ALIKE}"
            )
        if transposed:
            turned.add(name)
    return turned


def _is_turned(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a matrix has as many columns as its bias has entries, and not as many rows."""
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    bias = checkpoint.tensors.get(name.removesuffix("weight") + "bias")
    return bias is not None and len(bias.shape) == 1 and shape[0] != bias.shape[0] == shape[1]
