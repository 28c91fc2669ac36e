"""Quantised checkpoints: their numbers are codes, and no arithmetic on codes is a merge of weights."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from merging.checkpoints.formats.buffers import is_buffer
from merging.errors import CheckpointError

SETTINGS = ("quantization_config", "compression_config", "quantization")
"""Keys of a `config.json`, or of a configuration within it, that say that weights are quantised."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = re.compile(r"(scale|scales|scale_inv|absmax|amax)$")
"""How names of a quantised weight's scales end."""
DEQUANTISED_BY: Mapping[str, str] = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""`quant_method` → the class in `transformers` whose `dequantize=True` loads plain weights."""


def refuse_quantised(
    path: str, config: Mapping[str, Any], tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]
) -> None:
    """Refuses a checkpoint whose weights are quantised, by its configuration or by what its tensors are.

    Args:
        path: The checkpoint, for the message.
        config: Its `config.json`.
        tensors: Name, dtype and shape of its tensors.

    Raises:
        CheckpointError: It is quantised; the message says how to dequantise it.
    """
    tensors = list(tensors)
    settings = _settings(config)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        raise CheckpointError(
            f"{path} is quantised ({method or 'by its config.json'}), and codes cannot be merged. {remedy(config, method)}"
        )
    has_scales = any(SCALES.search(name) for name, _, _ in tensors)
    for name, dtype, shape in tensors:
        if _is_packed(name, dtype, shape) or (dtype in FLOAT8 and has_scales):
            raise CheckpointError(
                f"{path} is quantised: '{name}' is {str(dtype).removeprefix('torch.')}, and codes cannot be merged. "
                f"{remedy(config)}"
            )


def remedy(config: Mapping[str, Any], method: object = None) -> str:
    """How to get plain weights of a quantised checkpoint."""
    architecture = str(next(iter(config.get("architectures") or []), "AutoModelForCausalLM"))
    if not architecture.isidentifier():
        architecture = "AutoModelForCausalLM"
    source = "Dequantise it first, or take the checkpoint that it was quantised from"
    kind = DEQUANTISED_BY.get(str(method))
    if kind is not None:
        return (
            f"{source}: from transformers import {architecture}, {kind}; "
            f"{architecture}.from_pretrained(DIR, quantization_config={kind}(dequantize=True)).save_pretrained(NEW)"
        )
    if method in ("gptq", "awq"):
        return f"{source}: transformers cannot dequantise {method}, the libraries that quantise by it can"
    return (
        f"{source}: from transformers import {architecture}; model = {architecture}.from_pretrained(DIR); "
        "model.dequantize().save_pretrained(NEW)"
    )


def _settings(config: Mapping[str, Any]) -> Any:
    """What a configuration, or one within it, says of quantisation; None for nothing."""
    for key in SETTINGS:
        if config.get(key):
            return config[key]
    nested = (value for value in config.values() if isinstance(value, Mapping))
    return next((settings for value in nested if (settings := _settings(value)) is not None), None)


def _is_packed(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds codes: whole numbers that are no buffer of indices, counts or masks."""
    if dtype.is_floating_point or dtype in (torch.bool, torch.int64) or is_buffer(name, shape):
        return False
    return torch.Size(shape).numel() > 1
