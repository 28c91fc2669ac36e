"""Which matrices of a checkpoint are stored [in, out]: those of GPT-2's `Conv1D`."""

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.parameter_names import conv1d
from merging.errors import CheckpointError


def transposed_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the matrices that are stored [in, out].

    A bias has an entry for each output. Where each matrix that has a bias and is not square has as many rows, all are
    [out, in] and no model is built; otherwise it is asked for its `Conv1D` modules.

    Raises:
        CheckpointError: Some are, and transformers cannot build the model that tells which.
    """
    if not any(_is_turned(checkpoint, name) for name in checkpoint.tensors):
        return frozenset()
    try:
        model = skeleton.build(checkpoint.path, checkpoint.config, checkpoint.architecture)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Its biases say that matrices are stored [in, out], and only the model tells which: choose a method "
            "that treats outputs and inputs alike (iso_c, tsv_m, task_arithmetic)"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    live = skeleton.live_names(model, checkpoint.tensors)
    return frozenset(
        name for name, own in live.items() if isinstance(modules.get(own.removesuffix(".weight")), conv1d())
    )


def _is_turned(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a matrix has as many columns as its bias has entries, and not as many rows."""
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    bias = checkpoint.tensors.get(name.removesuffix("weight") + "bias")
    return bias is not None and len(bias.shape) == 1 and shape[0] != bias.shape[0] == shape[1]
