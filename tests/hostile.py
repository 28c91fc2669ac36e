"""Damaged files: a valid document is changed at one place or several, as JSON or YAML, and then perhaps as bytes."""

import json
from typing import Any

import yaml
from hypothesis import strategies as st

DEEP_LIST: Any = []
for _ in range(300):
    DEEP_LIST = [DEEP_LIST]

ODD_NUMBERS = [0, 1, -1, 2**31, 2**63, 10**40, 10**400, -(10**30), 0.5, 16.7, -0.0, 1e30, 1e308]
VALUES = st.sampled_from(
    [
        *(None, True, False, *ODD_NUMBERS, float("inf"), float("-inf"), float("nan")),
        *("", "x", "0", "-1", "1e9", "\0", "\ud800", "\u202e", "null", "2024-99-99", "x" * 300, "é" * 200),
        *(".", "..", "../x", "/etc/passwd", "~nobody-at-all/x", "zip://a::b", "s3://"),
        *([], {}, [[]], [None], [1, 2, 3], ["a", ["b"]], {"": 0}, {"a": {"b": None}}, [{}] * 3, DEEP_LIST),
    ]
)
PUT_IN = st.sampled_from([b"\0", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b'"', b"9" * 5000, b",", b"\n"])
TAGS = st.sampled_from(
    ["", "", "", "!!int ", "!!float ", "!!timestamp ", "!!python/name:os.system ", "&a ", "*a ", "<<: "]
)


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of a document, the whole one first."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [above, *(place for key in keys for place in paths(value[key], (*above, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A document with something else at a place; `...` takes the place away."""
    if not path:
        return new
    result: Any = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del result[path[0]]
    else:
        result[path[0]] = replaced(result[path[0]], path[1:], new)
    return result


@st.composite
def documents(draw: Any, valid: Any) -> Any:
    """A document with one to three places changed, taken away, or copied from another."""
    value = valid
    for _ in range(draw(st.integers(1, 3))):
        places = paths(value)
        place = draw(st.sampled_from(places))
        match draw(st.sampled_from(["value", "value", "gone", "moved"])):
            case "value":
                value = replaced(value, place, draw(VALUES))
            case "gone" if place:
                value = replaced(value, place, ...)
            case "moved":
                other: Any = value
                for key in draw(st.sampled_from(places)):
                    other = other[key]
                value = replaced(value, place, other)
    return value


@st.composite
def changed_bytes(draw: Any, valid: bytes, most: int = 3) -> bytes:
    """Bytes with some flipped, cut off, taken out, repeated or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "cut", "out", "in", "twice"])):
            case "flip" if data:
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place:]
            case "out":
                del data[place : place + draw(st.integers(1, 40))]
            case "in":
                data[place:place] = draw(PUT_IN)
            case "twice":
                data[place:place] = data[place : place + draw(st.integers(1, 80))]
    return bytes(data)


@st.composite
def json_files(draw: Any, valid: Any) -> bytes:
    """A JSON file's bytes, damaged in its structure or in its text."""
    how = draw(st.sampled_from(["structure", "structure", "structure", "bytes", "key twice"]))
    if how == "bytes":
        return draw(changed_bytes(json.dumps(valid).encode()))
    text = json.dumps(draw(documents(valid)))
    if how == "key twice" and isinstance(valid, dict) and valid:
        key = draw(st.sampled_from(sorted(valid)))
        text = text.rstrip()[:-1] + f", {json.dumps(key)}: 1}}"
    return text.encode()


@st.composite
def yaml_files(draw: Any, valid: Any) -> bytes:
    """A YAML file's bytes, damaged in its structure or in its text."""
    if draw(st.booleans()):
        return draw(changed_bytes(yaml.safe_dump(valid, sort_keys=False).encode()))
    text = yaml.safe_dump(draw(documents(valid)), sort_keys=False, allow_unicode=False)
    return text.replace(": ", f": {draw(TAGS)}", 1).encode()
