"""The number of tokens that a `config.json` says: its own, or that of the text model within it."""

from collections.abc import Mapping
from typing import Any

from merging.checkpoints.models import skeleton


def stated(config: Mapping[str, Any]) -> Any:
    """The number of tokens as a configuration says it, the text model's first; None where neither does."""
    text = config.get("text_config")
    inner = text.get("vocab_size") if isinstance(text, Mapping) else None
    return inner if inner is not None else config.get("vocab_size")


def resolved(config: Mapping[str, Any]) -> int | None:
    """The number of tokens, by default that of the configuration's class; None where there is none."""
    size = stated(config)
    if size is None and not isinstance(config.get("text_config"), Mapping):
        try:
            size = getattr(skeleton.parsed(config), "vocab_size", None)
        except Exception:  # transformers raises all kinds
            return None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def replaced(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A configuration with another number of tokens, wherever it says one; at least where its text model does."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        own = {"vocab_size": size} if "vocab_size" in config else {}
        return {**config, **own, "text_config": {**text, "vocab_size": size}}
    return {**config, "vocab_size": size}
