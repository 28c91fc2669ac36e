"""What an `adapter_config.json` says: whether it is a plain LoRA, and each module's rank and scaling."""

from collections.abc import Mapping
from typing import Any

from merging.checkpoints.adapters.patterns import matches
from merging.errors import CheckpointError
from merging.io.documents import is_number

NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings under which a member's weights are not θ_0 + scaling · B @ A."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base's weights."""
LARGEST = 1e9
"""Of ranks and factors: what is beyond was never trained, and leaves nothing finite."""
REMEDY = "Merge it into its base with peft (`model.merge_and_unload().save_pretrained(DIR)`), and name that directory"


def refuse_unknown(path: str, settings: Mapping[str, Any]) -> None:
    """Refuses what cannot be read as θ_0 + scaling · B @ A.

    Args:
        path: The adapter's directory, for messages.
        settings: Its `adapter_config.json`.

    Raises:
        CheckpointError: It is no LoRA, or more than that; or a rank or scaling factor is no number that it can have.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} is a {kind} adapter, and only LoRA is read as a member. {REMEDY}")
    if unknown := [key for key in NOT_PLAIN if settings.get(key)]:
        raise CheckpointError(f"{path} is a LoRA with {unknown[0]} = {settings[unknown[0]]!r}. {REMEDY}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_BASE):
        raise CheckpointError(f"{path} was initialised by '{start}', which changes the base's weights too. {REMEDY}")
    _check_numbers(path, settings)


def _check_numbers(path: str, settings: Mapping[str, Any]) -> None:
    """Looks whether ranks and scaling factors are what PEFT could have trained with."""
    for key, default in (("r", 8), ("lora_alpha", 8)):
        _check_number(path, key, settings.get(key, default), whole=key == "r")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{path}: {key} in its adapter_config.json is no mapping, but {patterns!r}")
        for pattern, value in patterns.items():
            _check_number(path, f"{key}['{pattern}']", value, whole=key == "rank_pattern")
            try:
                matches(pattern, "")
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {key} in its adapter_config.json: {error}") from error


def _check_number(path: str, name: str, value: object, *, whole: bool) -> None:
    """Looks whether a value is a positive number, and a product with it is finite."""
    if not is_number(value) or (whole and isinstance(value, float)) or not 0 < value <= LARGEST:
        kind = "whole number" if whole else "number"
        raise CheckpointError(f"{path}: {name} = {str(value)[:100]} in its adapter_config.json is no positive {kind}")


def of_module(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """A module's entry in `rank_pattern` or `alpha_pattern`, whose keys are regular expressions of the ends of paths.

    Raises:
        CheckpointError: A key backtracks without end.
    """
    for key, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({key})$", path):
            return float(value)
    return float(default)
