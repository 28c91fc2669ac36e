"""Small facts that took long to find: kept by this process, and in this user's cache directory for the next one here."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.errors import StorageError
from merging.io import atomic, hashing, storage

Key = Sequence[str]
"""All that a fact depends on; with an empty string in it, nothing is known well enough to be kept."""

_facts: dict[str, str] = {}


def remembered(key: Key, find: Callable[[], str], *, lasting: bool = True) -> str:
    """A fact that was found before, else from `find`, and then kept.

    Args:
        key: All that it depends on.
        find: Finds it.
        lasting: Whether to keep it for other processes too.
    """
    fact = recalled(key)
    if fact is None:
        fact = find()
        keep(key, fact, lasting=lasting)
    return fact


def recalled(key: Key) -> str | None:
    """A fact that was found before, by this process or another of this user; None where it is not known."""
    if not all(key):
        return None
    name = hashing.fingerprint(list(key))
    if name not in _facts:
        try:
            digest, _, fact = storage.read_text(str(_directory() / name)).partition(" ")
        except StorageError:
            return None
        if digest != hashing.fingerprint(fact):
            return None  # another format, or damaged: it is found again
        _facts[name] = fact
    return _facts[name]


def keep(key: Key, fact: str, *, lasting: bool = True) -> None:
    """Keeps a fact for this process, and for others where `lasting` and there is a right to write."""
    if not all(key):
        return
    name = hashing.fingerprint(list(key))
    _facts[name] = fact
    if lasting:
        try:
            atomic.write_text(str(_directory() / name), f"{hashing.fingerprint(fact)} {fact}")
        except StorageError:
            return


def known(keys: Iterable[Key]) -> dict[str, str]:
    """What is known of these, to be learnt elsewhere: it names no path."""
    return {hashing.fingerprint(list(key)): fact for key in keys if all(key) and (fact := recalled(key)) is not None}


def as_json(facts: Mapping[str, str]) -> dict[str, Any]:
    """Facts as a file keeps them, with what tells that it is as it was written."""
    return {"facts": dict(facts), "digest": hashing.fingerprint(dict(facts))}


def from_json(value: Any) -> dict[str, str]:
    """What `as_json` gave.

    Raises:
        ValueError: It is something else, or was changed.
    """
    if not isinstance(value, dict) or value != as_json(value.get("facts") or {}):
        raise ValueError("not the facts that were written")
    return {str(name): str(fact) for name, fact in value["facts"].items()}


def learn(facts: Mapping[str, str]) -> None:
    """Takes over what another process knew, for this process."""
    _facts.update(facts)


def cache_directory() -> Path:
    """This user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergequest"


def _directory() -> Path:
    return cache_directory() / "facts"
