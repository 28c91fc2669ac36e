"""`--set KEY=VALUE`: settings of a file from the command line, written and checked as if they stood in it."""

from collections.abc import Sequence
from typing import Any

from flows.config.yaml_file import refuse_secret
from merging.errors import SettingsError, StorageError
from merging.io.documents import parse_yaml


def with_overrides(settings: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A file's settings with those of the command line in their places.

    Args:
        settings: As the file has them; left as they are.
        assignments: `search.candidates=200`: the keys from the top down, joined by dots, and a value as YAML writes it.
            Of two with the same key the last one counts.

    Raises:
        SettingsError: One is no assignment, its value is no YAML, or a key leads into something that has no keys.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        refuse_secret("--set", assignment)
        if not equals or not all(part.strip() for part in key.split(".")):
            raise SettingsError(f"--set {assignment}: expected KEY=VALUE, such as search.candidates=200")
        try:
            value = parse_yaml(text, f"--set {key}")
        except StorageError as error:
            raise SettingsError(f"{error}\nWrite the value as in the file: --set '{key}=[a, b]'") from error
        settings = _assigned(settings, key, value, f"--set {key}")
    return settings


def _assigned(here: Any, key: str, value: Any, what: str, place: str = "") -> dict[str, Any]:
    """A section with one of its settings, or of a section below it, replaced."""
    section = _section(here, place, what)
    name = _entry(section, key)
    if name == key:
        return section | {name: value}
    below = f"{place}.{name}" if place else name
    return section | {name: _assigned(section.get(name), key[len(name) + 1 :], value, what, below)}


def _entry(here: dict[str, Any], key: str) -> str:
    """The key of this section that a path begins with: the longest that is there, since names may hold dots."""
    parts = key.split(".")
    heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((head for head in heads if head in here), parts[0])


def _section(value: Any, place: str, what: str) -> dict[str, Any]:
    """A value as a section; the short forms of some of them are spelled out.

    Raises:
        SettingsError: It is none.
    """
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and place == "search.methods" and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, str) and place.startswith("members."):
        return {"checkpoint": value}
    kind = "a list, which is set whole" if isinstance(value, list) else f"{value!r} there, and has no keys"
    raise SettingsError(f"{what}: '{place}' is {kind}")
