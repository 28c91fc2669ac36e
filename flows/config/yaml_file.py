"""What the files that users write have in common: how they are read, checked, and their mistakes explained."""

import os
import re
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merging.checkpoints.adapters.adapter import model_and_adapter
from merging.errors import SettingsError, StorageError
from merging.io import addresses, atomic, documents, hub, storage
from merging.io.secrets import holds_secret, redacted
from merging.registry import Registry, did_you_mean

Model = TypeVar("Model", bound=BaseModel)
MAX_LINE, MAX_LINES = 600, 30
"""Of a message: characters of a mistake, and mistakes."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
"""What files and directories can be called by."""
WORDS: Mapping[str, str] = {
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected `key: value` entries",
    "model_type": "expected `key: value` entries",
    "too_short": "expected at least one",
}
"""What pydantic says in Python's words, in YAML's."""
KIND = re.compile(r"float|int|str|bool|constrained-str|(dict|list|tuple)\[.*\]")
"""What pydantic calls, in the place of a mistake, one of the kinds that a value may be of."""
HOLDS_SECRET = (
    "the address holds a password, token or signature, which would be saved with the results: leave it out, and give "
    "credentials by the environment or the protocol's own configuration file"
)


def changed(section: BaseModel, names: Iterable[str]) -> list[str]:
    """Those of a section's settings that are not at their defaults."""
    return [name for name in names if getattr(section, name) != type(section).model_fields[name].default]


class Settings(BaseModel):
    """A section of the campaign file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """A section all of whose settings are left out is null in YAML, and has its defaults."""
        if not isinstance(value, dict):
            return value
        sections = {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
            and not field.is_required()
        }
        return {name: {} if given is None and name in sections else given for name, given in value.items()}

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any) -> Any:
        """YAML's `yes` would pass as 1, and an integer may have any number of digits."""
        for name, given in value.items() if isinstance(value, dict) else ():
            field = cls.model_fields.get(name)
            kinds = () if field is None else {field.annotation, *get_args(field.annotation)}
            if isinstance(given, bool) and bool not in kinds and {int, float} & set(kinds):
                raise ValueError(f"{name}: expected a number (found {str(given).lower()})")
            if isinstance(given, int) and abs(given) >= 1 << 63:
                raise ValueError(f"{name}: a number beyond all bounds (found {given:.3g})")
        return value


def load_yaml(path: str) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        SettingsError: It is missing, no YAML, or no mapping.
    """
    try:
        value = documents.read_yaml(path)
    except StorageError as error:
        raise SettingsError(redacted(str(error))) from error
    if not isinstance(value, dict):
        raise SettingsError(
            f"{path} holds no settings: expected `key: value` lines; `mergequest init` writes an example"
        )
    return value


def _secrets(value: Any, place: str) -> Iterator[str]:
    """The places of keys and values that hold a secret."""
    if isinstance(value, dict):
        for key, below in value.items():
            if holds_secret(str(key)):
                yield f"a key of {place.lstrip('.') or 'the file'}"
            yield from _secrets(below, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            yield from _secrets(below, f"{place}.{number}")
    elif isinstance(value, str) and holds_secret(value):
        yield place.lstrip(".")


def parent(path: str) -> str:
    """The directory of a local file or an address."""
    return addresses.absolute(path).rpartition("/")[0]


@contextmanager
def said_in(file: str) -> Iterator[None]:
    """Has errors of paths name the file that holds them.

    Raises:
        SettingsError: A path is none.
    """
    try:
        yield
    except StorageError as error:
        raise SettingsError(f"{file}: {error}") from error


def resolve(path: str, root: str) -> str:
    """`path` as it is if absolute or an address, else below `root`."""
    if not addresses.is_local(path) or hub.is_hub(path):
        return path
    place = addresses.expanded(path)
    return os.path.normpath(place if place.is_absolute() else addresses.join(root, str(place)))


def resolve_checkpoint(path: str, root: str) -> str:
    """As `resolve`, of both parts of `MODEL+ADAPTER`; `ORG/NAME[@REVISION]` is on the Hub where there is no directory `ORG`."""
    if hub.SCHEME in path:
        return "+".join(_place_or_id(part, root) for part in path.split("+"))
    whole = resolve(path, root)
    if not model_and_adapter(whole):
        return _place_or_id(path, root)
    return "+".join(_place_or_id(part, root) for part in path.split("+"))


def _place_or_id(path: str, root: str) -> str:
    place = resolve(path, root)
    if not hub.is_id(path) or storage.exists(place.rpartition("/")[0]):
        return place
    return f"{hub.SCHEME}{path}"


def refuse_secret(what: str, address: str) -> None:
    """Looks whether an address of the command line could be shown and saved.

    Raises:
        SettingsError: It holds a password, token or signature.
    """
    if holds_secret(address):
        raise SettingsError(f"{what}: {HOLDS_SECRET}")


def require_writable(path: str) -> None:
    """Looks whether a directory could be written, before the work that fills it.

    Raises:
        SettingsError: It cannot, or there is a file in its place.
        StorageError: The same of a remote one, where a small object is written and removed again.
    """
    if hub.is_hub(path):
        raise SettingsError(f"{path} is on the Hub: write into a directory, then `mergequest push DIR ORG/NAME`")
    if not addresses.is_local(path):
        probe = addresses.join(path, f".{uuid.uuid4().hex}.probe")
        atomic.write_bytes(probe, b"")
        storage.remove(probe)
        return
    place = addresses.local_path(path)
    if place.exists() and not place.is_dir():
        raise SettingsError(f"{path} is a file; name a directory")
    parent = next(p for p in (place, *place.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(
            f"there is no right to write in {parent} ({reason}): choose another place with --out"
        ) from error


def require_known(place: str, kind: str, name: str, known: Collection[str] | Registry[Any]) -> None:
    """Looks whether a name that a file gives is one that there is; for validators, whose `ValueError` becomes one mistake.

    Args:
        place: The setting.
        kind: What is named ("task").
        name: The name.
        known: The names that there are; a registry of methods also contains modified ones ("lines+ties").

    Raises:
        ValueError: It is none of them; the message has the nearest.
    """
    if name not in known:
        raise ValueError(f"{place}: unknown {kind} '{name}'. {did_you_mean(name, list(known))}")


def validate(model: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """`value` as a settings model.

    Raises:
        SettingsError: One line for every mistake, with the place in the file and the nearest known key.
    """
    if places := list(_secrets(value, "")):
        raise SettingsError(f"{where}: {', '.join(places)}: {HOLDS_SECRET}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        entries = _of_the_kind_meant(error.errors(include_url=False))
        mistakes = [redacted(_explain(model, entry)) for entry in entries]
        lines = [f"  - {line if len(line) <= MAX_LINE else line[:MAX_LINE] + ' …'}" for line in mistakes[:MAX_LINES]]
        lines += [f"  … and {len(mistakes) - MAX_LINES} more"] if len(mistakes) > MAX_LINES else []
        raise SettingsError(
            f"{where}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:\n" + "\n".join(lines)
        ) from error


def _of_the_kind_meant(entries: Sequence[Any]) -> list[Any]:
    """Mistakes of values of several kinds (a number or a mapping): of the kind that was meant, and where none was, as one.

    pydantic tries every kind, and has its name in the place. A kind that fails by the value's type alone was not meant, if
    another one does not. A list whose entries are all wrong counts as empty; that is no mistake of its own.
    """
    meant: set[tuple[Any, ...]] = set()
    above: set[tuple[Any, ...]] = set()
    kept: dict[tuple[Any, ...], Any] = {}
    for entry in entries:
        place = entry["loc"]
        above.update(place[:end] for end in range(len(place)))
        kinds = [end for end, part in enumerate(place) if KIND.fullmatch(str(part))]
        meant.update(place[:end] for end in kinds if end < len(place) - 1 or not _by_type_alone(entry))
    for number, entry in enumerate(entries):
        place = entry["loc"]
        if entry["type"] == "too_short" and place in above:
            continue
        if place and KIND.fullmatch(str(place[-1])) and _by_type_alone(entry) and place[:-1] in meant:
            continue
        cleaned = tuple(part for part in place if not KIND.fullmatch(str(part)))
        if cleaned == place:  # two mistakes of one place stay two
            kept[number, *place] = entry
        elif first := kept.get(cleaned):
            both = f"{_message(first)}, or {_message(entry).removeprefix('Input should be ')}"
            kept[cleaned] = {**first, "msg": both, "type": "union"}
        else:
            kept[cleaned] = {**entry, "loc": cleaned}
    return list(kept.values())


def _by_type_alone(entry: Any) -> bool:
    return str(entry["type"]).endswith("_type")


def _message(entry: Any) -> str:
    """What pydantic says is wrong, in YAML's words."""
    return WORDS.get(entry["type"], str(entry["msg"]).removeprefix("Value error, "))


def _explain(model: type[BaseModel], entry: Any) -> str:
    """One mistake that pydantic found, in a user's words."""
    place = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, entry["loc"][:-1]))
        return f"{place}: unknown key. {did_you_mean(str(entry['loc'][-1]), known)}"
    if entry["type"] == "missing":
        return f"{place}: missing"
    if entry["type"] == "union_tag_invalid":
        kinds = re.findall(r"'(\w+)'", entry["ctx"]["expected_tags"])
        return f"{place}.kind: unknown kind '{entry['ctx']['tag']}'. {did_you_mean(str(entry['ctx']['tag']), kinds)}"
    if entry["loc"][-1:] == ("[key]",) and not isinstance(entry["input"], str):
        above = ".".join(str(part) for part in entry["loc"][:-2])
        return f"{above}: a name is needed, and YAML reads one of them as {entry['input']!r}: write it in quotes"
    place = place.removesuffix(".[key]")
    if entry.get("ctx", {}).get("pattern") == NAME:
        given = repr(entry["input"])
        return f"{place}: a name has letters, digits and . _ - only, and begins with a letter or digit (found {given})"
    message = _message(entry)
    shown = "" if isinstance(entry["input"], dict) else f" (found {entry['input']!r})"
    return f"{place}: {message}{shown}" if place else message


def _fields_at(annotation: Any, loc: tuple[Any, ...]) -> set[str]:
    """The keys that are known at a place of the file."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return set(annotation.model_fields)
        field = annotation.model_fields.get(str(loc[0]))
        return _fields_at(field.annotation, loc[1:]) if field else set()
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        return _fields_at(inner[-1], loc[1:])
    if get_origin(annotation) is Annotated:
        return _fields_at(inner[0], loc)
    if get_origin(annotation) in (Union, UnionType) and loc:  # a union that is told apart by a tag has it in the place
        inner = tuple(
            m for m in inner if "kind" in getattr(m, "model_fields", {}) and m.model_fields["kind"].default == loc[0]
        )
        loc = loc[1:]
    return set().union(*(_fields_at(argument, loc) for argument in inner))
