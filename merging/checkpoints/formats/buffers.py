"""Tensors of a checkpoint that are no parameters: tables that a model makes itself, and running statistics."""

import re

DERIVED = re.compile(
    r"(^|\.)(masked_bias|inv_freq|original_inv_freq|position_ids|token_type_ids|cos_cached|sin_cached|freqs_cis|"
    r"num_batches_tracked|causal_mask|_float_tensor|relative_position_index|relative_coords_table|attn_mask|(encoder|decoder)\.version|final_logits_bias)$"
)
"""Names of buffers that follow from the configuration, count, or are never trained; only some versions save them."""
MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
"""Name of a causal mask [1, 1, n, n]; a bias of one dimension is a parameter."""
RUNNING = re.compile(r"(^|\.)(running_mean|running_var)$")


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer that no merge changes: the base's is kept."""
    return DERIVED.search(name) is not None or (len(shape) == 4 and MASK.search(name) is not None)


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is the mean or variance that a BatchNorm layer has seen: these are averaged by every method."""
    return RUNNING.search(name) is not None
