"""Checkpoints whose tensors are those of PEFT's wrapper, and not of the model in it."""

import re
from collections.abc import Iterable

from merging.errors import CheckpointError

OF_WRAPPER = re.compile(r"(^|\.)(base_model\.model\.|base_layer\.|lora_(embedding_)?[AB](\.|$)|modules_to_save\.)")
"""What PEFT puts into names: before a model's own, or between a module and its weights."""


def refuse_wrapped(path: str, names: Iterable[str]) -> None:
    """Refuses a checkpoint that was saved while an adapter was attached: weights and adapter stand apart in it.

    Args:
        path: The checkpoint, for the message.
        names: Its tensors'.

    Raises:
        CheckpointError: It was; the message says how to save the model itself.
    """
    if wrapped := next((name for name in names if OF_WRAPPER.search(name)), None):
        raise CheckpointError(
            f"{path} is the state of a model in PEFT's wrapper ('{wrapped}'), saved as if it were the model. Save the model "
            "with the adapter merged into it (`peft_model.merge_and_unload().save_pretrained(DIR)`), or the adapter alone "
            "(`peft_model.save_pretrained(DIR)`), which can be a member as it is"
        )
