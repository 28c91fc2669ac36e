"""JSON and YAML from files that anybody may have written: bounded in size and depth, no key twice, one error with its place."""

import json
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeGuard, TypeVar

import yaml

from merging.errors import MergequestError, StorageError
from merging.io.addresses import is_local
from merging.io.storage import read_bytes, size

T = TypeVar("T")

MAX_BYTES = 64 << 20
"""Of a JSON document: the largest that belong to a checkpoint, indices of many thousands of tensors, have a few MB."""
MAX_YAML_BYTES = 1 << 20
"""Of a YAML document: a campaign of a thousand members has 200 kB, and the parser reads some 200 kB a second."""
MAX_DEPTH = 64
"""Lists and mappings within each other: below the recursion limit of all that handles the value later."""
MAX_NODES = 50_000
"""Values of a YAML document, every alias counted as often as it stands there."""
MAX_DIGITS = 100
"""Of an integer: what has more is converted slowly, and to no float."""
MAX_SHOWN = 300
"""Characters of a document that a message repeats."""
ALLOWED_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
MERGE_TAG = "tag:yaml.org,2002:merge"


def read_json(path: str) -> Any:
    """A JSON file's value.

    Raises:
        StorageError: The file is missing or not JSON, or beyond the bounds of `merging.io.documents`.
    """
    return parse_json(_read_bounded(path, MAX_BYTES), path)


def read_object(path: str) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        StorageError: As `read_json`; or it holds something else.
    """
    return as_object(read_json(path), path)


def read_yaml(path: str) -> Any:
    """A YAML file's value.

    Raises:
        StorageError: The file is missing or not YAML, or beyond the bounds of `merging.io.documents`.
    """
    try:
        return parse_yaml(_read_bounded(path, MAX_YAML_BYTES).decode(), path)
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is not a UTF-8 text file") from error


def read_as(path: str, build: Callable[[Any], T]) -> T:
    """What `build` makes of a JSON file's value.

    Args:
        path: The file, which the program itself wrote.
        build: Looks up and converts what it needs.

    Raises:
        StorageError: The file is missing or not JSON, or `build` finds that it is something else.
    """
    return made_from(read_json(path), build, path)


def made_from(value: Any, build: Callable[[Any], T], path: str) -> T:
    """What `build` makes of what a file holds.

    Raises:
        StorageError: It finds that it is something else.
    """
    try:
        return build(value)
    except (MergequestError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = str(error) if isinstance(error, MergequestError) else f"{type(error).__name__}: {error}"
        raise StorageError(f"{path} is damaged, or was not written by mergequest ({reason[:300]})") from error


def _read_bounded(path: str, most: int) -> bytes:
    """A file's bytes, or so many of them that its size is seen to be too large."""
    return read_bytes(path, 0, min(size(path), most + 1) if is_local(path) else most + 1)


def parse_json(
    data: bytes | str, where: str, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, whole_text: bool = True
) -> Any:
    """A JSON document's value.

    Args:
        data: The document, UTF-8.
        where: What it is, for messages: a path, or a path and a line.
        max_bytes: Largest size that is read.
        max_depth: Deepest nesting that is read.
        whole_text: Whether to refuse halves of characters, which cannot be written.

    Raises:
        StorageError: It is no JSON, too large, nested too deep, has a key twice, an integer of absurd length, or half
            of a character.
    """
    if len(data) > max_bytes:
        raise StorageError(
            f"{where} has {len(data):,} bytes, and no such file has more than {max_bytes:,}: copy it again"
        )
    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, object_pairs_hook=_once, parse_int=_integer)
        if _depth_exceeds(value, max_depth):
            raise ValueError(f"nested more than {max_depth} deep")
        if whole_text and ("\\ud" in text or "\\uD" in text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise StorageError(f"{where} is not valid JSON: nested more than {max_depth} deep") from error
    except UnicodeDecodeError as error:
        raise StorageError(f"{where} is not valid JSON: byte {error.start:,} is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise StorageError(f"{where} is not valid JSON: it holds half of a character (a lone surrogate)") from error
    except ValueError as error:
        raise StorageError(f"{where} is not valid JSON: {error}") from error
    return value


def parse_yaml(text: str, where: str) -> Any:
    """A YAML document's value, made of null, booleans, numbers, texts, lists and mappings only.

    Args:
        text: The document.
        where: Its path, for messages.

    Raises:
        StorageError: It is no YAML, too large, nested too deep, expands to too much by aliases or contains itself, has
            a key twice or a tag other than YAML's own for these values.
    """
    if len(text) > MAX_YAML_BYTES:
        raise StorageError(f"{where} has {len(text):,} characters, and no such file has more than {MAX_YAML_BYTES:,}")
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise StorageError(f"{where} is not valid YAML: {_one_line(error)}") from error


def as_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a JSON object.

    Raises:
        StorageError: It is something else.
    """
    if not isinstance(value, dict):
        raise StorageError(f"{where} holds {_kind(value)}, where `{{…}}` is expected")
    return value


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is an integer from 0 on that fits 63 bits, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # compares integers of any size, and NaN with nothing


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be written: JSON may also hold halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ: which of two entries counts is nobody's to say."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"'{key[:100]}' stands there twice")
            seen.add(key)
    return entries


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested deeper, found level by level: it costs no recursion."""
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            part
            for outer in level
            if isinstance(outer, dict | list)
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


class _Loader(yaml.SafeLoader):
    """YAML's own values only, within bounds that hold while it is scanned, composed and constructed."""

    _nodes = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """`[` or `{`: what PyYAML keeps of each that is open, it looks through at every further token."""
        if self.flow_level >= MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        """A deeper block."""
        if len(self.indents) >= MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} deep", self.get_mark())
        return bool(super().add_indent(column))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One more of the document's nodes."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._refuse(f"more than {MAX_NODES:,} values", self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The document's tree, once it is known what it expands to."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._expanded(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; what its tag's own reader cannot make of it has the place, too."""
        if node.tag == MERGE_TAG:
            self._refuse("'<<' stands where it merges nothing", node.start_mark)
        if node.tag not in ALLOWED_TAGS:
            self._refuse(f"the tag {node.tag!r} is not allowed here", node.start_mark)
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            self._refuse(f"an integer of {len(node.value):,} digits", node.start_mark)
        try:
            value = super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # each tag's reader raises another kind
            self._refuse(f"{_shown(node)} is no {node.tag.rpartition(':')[2]} ({error})", node.start_mark)
        if isinstance(value, str) and not is_text(value):
            self._refuse("a text with half of a character (a lone surrogate)", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping in which a key stands once; what `<<` brings, its own entries replace."""
        if isinstance(node, yaml.MappingNode):  # else the next line says what it is
            own = (key for key, _ in node.value if key.tag != MERGE_TAG)
            self._differ((key, self.construct_object(key, deep=True)) for key in own)
            merged = [key for key, _ in node.value if key.tag == MERGE_TAG]
            if len(merged) > 1:
                self._refuse("'<<' stands there twice: give it a list", merged[1].start_mark)
        return super().construct_mapping(node, deep=deep)

    def _differ(self, keys: Iterable[tuple[yaml.Node, Any]]) -> None:
        seen: set[Hashable] = set()
        for node, key in keys:
            if not isinstance(key, Hashable):
                self._refuse("a list or a mapping cannot be a key", node.start_mark)
            if key in seen:
                self._refuse(f"'{str(key)[:100]}' stands there twice", node.start_mark)
            seen.add(key)

    def _expanded(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Nodes of a tree, each alias counted as what it stands for; 0 while one is counted."""
        if (known := sizes.get(id(node))) is not None:
            if not known:
                self._refuse("a value contains itself", node.start_mark)
            return known
        sizes[id(node)] = 0
        size = 1
        if isinstance(node, yaml.CollectionNode):
            for entry in node.value:
                for part in entry if isinstance(entry, tuple) else (entry,):
                    size += self._expanded(part, sizes)
        if size > MAX_NODES:
            self._refuse(f"more than {MAX_NODES:,} values, aliases expanded", node.start_mark)
        sizes[id(node)] = size
        return size

    def _refuse(self, problem: str, mark: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


# a date would be a type of its own, which no setting has
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _shown(node: yaml.Node) -> str:
    return repr(node.value[:60]) if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong, and where; without the lines of the document that PyYAML quotes."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return error.problem[:MAX_SHOWN] + place
    return " ".join(str(error).split())[:MAX_SHOWN]


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "something else")
