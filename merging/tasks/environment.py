"""References to environment variables in settings (`${NAME}`): resolved where they are used, never saved or shown."""

import os
import re
from collections.abc import Mapping
from typing import Any

from merging.io.secrets import holds_secret, redacted

REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
SHORTEST = 4
"""Characters from which a value is hidden in messages: shorter ones stand in many words."""


NAMED = re.compile(r"(^|[_-])(auth|cookies?|pass)$", re.IGNORECASE)
"""How arguments are called that hold a secret, beside the words of `merging.io.secrets`."""
KEY = re.compile(r"(^|[_-])key$", re.IGNORECASE)
RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[\w.+/=-]{16,}\Z")
"""A text that is no word: where an argument is called a key, it is one that opens something."""


def references(value: Any) -> set[str]:
    """Names of the variables that a value refers to, at any depth."""
    if isinstance(value, str):
        return set(REFERENCE.findall(value))
    if isinstance(value, Mapping):
        return set().union(*map(references, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(references, value))
    return set()


def resolved(value: Any) -> Any:
    """The value with what its variables hold now.

    Raises:
        KeyError: One is not set; its name.
    """
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: os.environ[match[1]], value)
    if isinstance(value, Mapping):
        return {key: resolved(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(inner) for inner in value]
    return value


def hidden(text: str, names: set[str]) -> str:
    """A text in which what these variables hold is replaced by the reference to them."""
    held = {name: os.environ.get(name, "") for name in names}
    for name in sorted(held, key=lambda name: -len(held[name])):
        if len(held[name]) >= SHORTEST:
            text = text.replace(held[name], f"${{{name}}}")
    return text


def secret_in(value: Any, key: str = "") -> str | None:
    """The place of the first text at any depth that looks like a secret written out; None where there is none."""
    if isinstance(value, str):
        plain = REFERENCE.sub("", value)
        is_named = plain == value and bool(value) and _names_secret(key, value)
        return key if is_named or holds_secret(plain) or redacted(plain) != plain else None
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, list | tuple):
        options = (before if isinstance(before, str) and before.startswith("-") else "" for before in ("", *value))
        entries = [(option.lstrip("-") or key, inner) for option, inner in zip(options, value, strict=False)]
    return next((secret for name, inner in entries if (secret := secret_in(inner, str(name))) is not None), None)


def _names_secret(key: str, value: str) -> bool:
    """Whether an argument's name says that its value is a secret."""
    if NAMED.search(key) or (KEY.search(key) and RANDOM.match(value)):
        return True
    return redacted(f"{key}={value}") != f"{key}={value}"
