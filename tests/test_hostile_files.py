"""Whatever a file holds, whoever reads it gets a value or one typed error that names it: every reader, fuzzed within a budget.

`FUZZ_EXAMPLES=5000 pytest tests/test_hostile_files.py` looks further; what it finds becomes a case of `CASES`.
"""

import copy
import json
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from flows.campaign import starts, weight_checks
from flows.cli.status import read_status
from flows.config.campaign_file import dump, load_campaign
from flows.config.recipe_file import load_recipe
from flows.config.slices_file import load_slices
from flows.directory import lock
from flows.directory.campaign_directory import Directory
from flows.report.test_answers import KeptPredictions
from merging.checkpoints.adapters.adapter import open_checkpoint
from merging.checkpoints.adapters.patterns import matches
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.directories.manifest import written
from merging.checkpoints.formats.safetensors_file import SafetensorsFile
from merging.errors import MergequestError
from merging.evaluation.score_cache import KnownScores
from merging.evaluation.steps import Trace
from merging.io import addresses, documents, fact_cache
from merging.recipe import Recipe
from merging.statistics.statistics_file import StatisticsFile
from merging.tasks.labelled_texts import Columns, Examples, read_examples
from search.early_stopping.anchor_examples import Anchors
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.samplers.make_sampler import make_sampler
from search.subsets.choose_subsets import Selection

sys.path.insert(0, str(Path(__file__).parent))
import hostile

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TENSORS = {"a.weight": torch.eye(3), "b.weight": torch.ones(4), "c": torch.zeros(0)}
CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "id2label": {"0": "a", "1": "b"},
    "text_config": {"vocab_size": 30, "num_attention_heads": 2},
}
STATISTICS = {
    "format": "mergequest.statistics",
    "format_version": "1",
    "kind": "fisher",
    "settings": '{"kind": "fisher", "version": 1}',
    "examples": "10",
    "tokens": "100",
    "checkpoint": "ab",
    "data": "cd",
    "mergequest": "0.1",
    "shared": '{"d": "c"}',
    "transposed": '["a.weight"]',
}
CAMPAIGN = {
    "name": "x",
    "base": "base",
    "members": {"one": {"checkpoint": "one", "task": "t", "statistics": ["f.safetensors"]}, "two": "two"},
    "tasks": {"t": {"data": {"train": "t.csv", "validation": ["v.csv"]}, "max_length": 20}},
    "search": {
        "methods": {
            "ties": {"scaling": {"low": 0.1, "high": 1.0}, "parameters": {"density": [0.1, 0.2]}},
            "average": {},
        },
        "candidates": 12,
        "sampler_arguments": {"n_startup_trials": 3},
        "constraints": [{"task": "t", "drop": 0.1}],
    },
    "selection": {"mode": "all"},
    "seed": 1,
}
RECIPE = {
    "base": "base",
    "members": {"one": {"checkpoint": "one", "statistics": ["f"]}, "two": "two"},
    "method": "ties",
    "scaling": {"one": 0.5, "two": {"layers:0-2": 0.5, "*": 1.0}},
    "parameters": {"density": 0.2},
}
SLICES = {
    "base": "base",
    "members": {"one": {"checkpoint": "one"}, "two": "two"},
    "slices": [
        {"source": "base", "layers": "0-2", "scale": 0.5},
        {"source": "one", "layers": 1, "scale": {"*.weight": 0.5}},
    ],
    "rest": "two",
}
SCORE = {"value": 0.5, "standard_error": 0.1, "examples": 3, "metric": "accuracy"}
TRACE = {
    "scores": [{"t": SCORE}],
    "values": {"t": [0.0, 1.0]},
    "surrogates": {"t": [0.1, 0.2]},
    "losses": {"t": [0.1, 0.2]},
}
STARTS = {
    "starts": [{"method": "ties", "scaling": {"one": 0.5}, "parameters": {}, "stage": "theory", "examples": 3}],
    "theory": {
        "kind": "fisher",
        "names": ["a"],
        "members": ["one"],
        "forms": {"ties:x": {"one": {"curvature": [[[1.0]]], "pull": [[1.0]], "constant": [1.0]}}},
    },
}
POOL = {
    "checkpoints": {"base": "ab", "one": "cd"},
    "data": {"t": {"validation": "ef"}},
    "configurations": {"one": CONFIG},
}
PROGRESS = {
    "heard": "2026-01-01T00:00:00+00:00",
    "phase": "Search",
    "evaluators": 2,
    "busy": 1,
    "per_minute": 1.5,
    "seconds_left": 20.0,
    "host": "here",
    "pid": 12,
    "ended": None,
}
LEASE = {"owner": "a", "host": "here", "pid": 12, "born": 1.5, "boot": "b", "namespace": "n", "beat": 3}
SELECTION = {
    "mode": "all",
    "names": ["one", "two"],
    "subsets": [["one"], ["one", "two"]],
    "log_dets": [0.0, None],
    "quality": {"one": 1.0, "two": 0.5},
    "similarity": [[1.0, 0.5], [0.5, 1.0]],
    "effective_rank": 1.5,
    "notes": [],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def read_or_refused(read: Callable[[], Any], names: str) -> tuple[Any, str | None]:
    """What was read, or the message of a typed error, which names the file."""
    try:
        return read(), None
    except MergequestError as error:
        message = str(error)
        assert names in message, message
        assert len(message) < 5000
        message.encode(errors="backslashreplace")
        return None, message


def refused(read: Callable[[], object], names: str) -> str | None:
    """The message of a typed error, which names the file; None where it was read."""
    return read_or_refused(read, names)[1]


def header(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data."""
    raw = save(tensors, metadata)
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(head: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


def read_all(path: Path) -> int:
    """Bytes of all tensors, each of which must be what its header says."""
    file = SafetensorsFile.open(str(path))
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape
    return sum(info.nbytes for info in file.tensors.values())


def checkpoint(place: Path, name: str, config: bytes | None = None) -> Path:
    directory = place / name
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(json.dumps(CONFIG).encode() if config is None else config)
    return directory


HEADER, DATA = header(TENSORS, {"format": "pt"})


@fuzz
@given(
    st.one_of(
        hostile.json_files(HEADER).map(lambda head: packed(head, DATA)),
        hostile.changed_bytes(packed(json.dumps(HEADER).encode(), DATA)),
    )
)
def test_safetensors(place: Path, content: bytes) -> None:
    path = place / "x.safetensors"
    path.write_bytes(content)
    total, _ = read_or_refused(lambda: read_all(path), str(path))
    assert total is None or total == len(content) - 8 - struct.unpack("<Q", content[:8])[0]


@fuzz
@given(hostile.json_files(CONFIG))
def test_config(place: Path, content: bytes) -> None:
    directory = checkpoint(place, "config", content)
    (directory / "model.safetensors").write_bytes(save(TENSORS))
    opened, _ = read_or_refused(lambda: Checkpoint.open(str(directory)), str(directory))
    assert opened is None or (isinstance(opened.config, dict) and opened.tensors.keys() == TENSORS.keys())


@fuzz
@given(hostile.json_files({"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(TENSORS, "one.safetensors")}))
def test_index(place: Path, content: bytes) -> None:
    directory = checkpoint(place, "index")
    (directory / "one.safetensors").write_bytes(save(TENSORS))
    (directory / "model.safetensors.index.json").write_bytes(content)
    opened, _ = read_or_refused(lambda: Checkpoint.open(str(directory)), str(directory))
    assert opened is None or opened.tensors.keys() <= TENSORS.keys()


@fuzz
@given(
    st.one_of(
        hostile.documents(STATISTICS),
        *(
            hostile.documents(json.loads(STATISTICS[key])).map(
                lambda value, key=key: STATISTICS | {key: json.dumps(value)}
            )
            for key in ("settings", "shared", "transposed")
        ),
    )
)
def test_statistics(place: Path, metadata: Any) -> None:
    path = place / "fisher.safetensors"
    path.write_bytes(packed(json.dumps(HEADER | {"__metadata__": metadata}).encode(), DATA))

    def read() -> dict[str, torch.Tensor]:
        file = StatisticsFile.open(str(path))
        return {name: file.read(name) for name in file.names}

    tensors, _ = read_or_refused(read, str(path))
    written = [value.tolist() for value in TENSORS.values()]
    assert all(value.tolist() in written for value in (tensors or {}).values())


@fuzz
@given(hostile.yaml_files(CAMPAIGN))
def test_campaign(place: Path, content: bytes) -> None:
    path = place / "campaign.yaml"
    path.write_bytes(content)
    campaign, _ = read_or_refused(lambda: load_campaign(str(path)), str(path))
    if campaign is not None:  # what was resolved can be kept and read again
        path.write_text(dump(campaign))
        assert load_campaign(str(path)) == campaign


@fuzz
@given(hostile.yaml_files(RECIPE))
def test_recipe(place: Path, content: bytes) -> None:
    path = place / "recipe.yaml"
    path.write_bytes(content)

    def read() -> Recipe:
        result = load_recipe(str(path))
        try:
            return result.recipe()
        except MergequestError as error:
            raise MergequestError(f"{path}: {error}") from error

    recipe, _ = read_or_refused(read, str(path))
    assert recipe is None or (recipe.identity and all(map(math.isfinite, recipe.scaling.values())))


@fuzz
@given(hostile.yaml_files(SLICES))
def test_slices(place: Path, content: bytes) -> None:
    path = place / "slices.yaml"
    path.write_bytes(content)
    slices, _ = read_or_refused(lambda: load_slices(str(path)), str(path))
    if slices is not None:
        path.write_text(yaml.safe_dump(slices.model_dump(mode="json")))
        assert load_slices(str(path)) == slices


OWN: dict[str, tuple[Any, Callable[[str, Path], object]]] = {
    "pool.json": (POOL, lambda path, place: _check_pool(place)),
    "timings.json": ({"Search": 1.5}, lambda path, place: Directory(str(place)).read_timings()),
    "selection.json": (SELECTION, lambda path, place: documents.read_as(path, Selection.from_dict)),
    "starts.json": (STARTS, lambda path, place: documents.read_as(path, starts._read)),
    "trace.json": (TRACE, lambda path, place: documents.read_as(path, Trace.from_dict)),
    "facts.json": (fact_cache.as_json({"a": "b"}), lambda path, place: weight_checks._read(str(place))),
    ".lease.json": (LEASE, lambda path, place: lock.is_gone(lock._read(path) or {})),
    ".mergequest.json": ({"version": 1, "files": {"a": 3, "b": "c"}}, lambda path, place: written(str(place))),
    "progress.json": (PROGRESS, lambda path, place: read_status(str(place)).as_text()),
    "done.json": (
        {"candidates": 12, "seconds": None, "top": 3, "baselines": []},
        lambda path, place: read_status(str(place)).as_json(),
    ),
}


def _check_pool(place: Path) -> None:
    result = {"checkpoints": {"base": "ab"}, "data": {"t": {"validation": "ef"}}, "configurations": {"one": CONFIG}}
    Directory(str(place)).check_pool(result)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign's directory with a row in its ledger."""
    place = tmp_path_factory.mktemp("campaign")
    (place / "campaign.yaml").write_text(json.dumps(CAMPAIGN))
    Ledger(str(place / "ledger"), "x").append(row())
    (place / "exports" / "best").mkdir(parents=True)
    (place / "exports" / "best" / "config.json").touch()
    (place / "report.html").touch()
    return place


def row() -> Row:
    numbers = {"t": 0.5}
    return Row(
        "x",
        "c",
        "validation",
        "search",
        "complete",
        "ties",
        ("one",),
        {"one": 0.5},
        {"density": 0.2},
        scores=numbers,
        losses=numbers,
        examples={"t": 3},
        objective=0.5,
        standard_errors=numbers,
    )


@pytest.mark.parametrize("name", OWN)
@fuzz
@given(data=st.data())
def test_own_files(campaign: Path, name: str, data: Any) -> None:
    valid, read = OWN[name]
    path = campaign / name
    path.write_bytes(data.draw(hostile.json_files(valid)))
    try:
        result, message = read_or_refused(
            lambda: read(str(path), campaign), str(campaign) if name == "done.json" else ""
        )
        assert message != ""
        assert message is not None or repr(read(str(path), campaign)) == repr(result)  # read as it is, whoever reads it
    finally:
        path.unlink()


@pytest.mark.parametrize("name", OWN)
def test_own_files_as_written(campaign: Path, name: str) -> None:
    valid, read = OWN[name]
    (campaign / name).write_text(json.dumps(valid))
    try:
        assert refused(lambda: read(str(campaign / name), campaign), "") is None
    finally:
        (campaign / name).unlink()


@fuzz
@given(data=st.data())
def test_ledger(place: Path, campaign: Path, data: Any) -> None:
    """A changed file is refused, or holds the row that was written: nothing in it may change without a word."""
    whole = next((campaign / "ledger").iterdir()).read_bytes()
    directory = place / "ledger"
    directory.mkdir(exist_ok=True)
    (directory / "one.parquet").write_bytes(data.draw(hostile.changed_bytes(whole, most=2)))

    def read() -> None:
        for result in Ledger(str(directory)).rows():
            assert result.scores == {"t": 0.5}
            assert result.members == ("one",)

    refused(read, str(directory))


def _tables() -> dict[str, bytes]:
    frame = pd.DataFrame({"text": ["a good film", "a bad one"] * 4, "label": ["pos", "neg"] * 4})
    return {
        "x.parquet": frame.to_parquet(),
        "x.csv": frame.to_csv(index=False).encode(),
        "x.jsonl": frame.to_json(orient="records", lines=True).encode(),
    }


TABLES = _tables()


@pytest.mark.parametrize("name", TABLES)
@fuzz
@given(data=st.data())
def test_data(place: Path, name: str, data: Any) -> None:
    path = place / name
    path.write_bytes(data.draw(hostile.changed_bytes(TABLES[name])))
    check_examples(*read_or_refused(lambda: labelled(path), str(path)))


def labelled(path: Path) -> Examples:
    return read_examples([str(path)], Columns("text", None, "label"), ["neg", "pos"])


def check_examples(examples: Examples | None, message: str | None) -> None:
    """Texts that can be written, each with a class of the head."""
    assert (examples is None) != (message is None)
    if examples is not None:
        (texts,) = examples.texts
        assert len(texts) == len(examples.labels) > 0
        assert set(examples.labels.tolist()) <= {0, 1}
        assert "".join(texts).encode()


@fuzz
@given(hostile.json_files({"text": "a", "label": "pos", "more": {"a": [1, None]}}))
def test_json_lines(place: Path, content: bytes) -> None:
    path = place / "y.jsonl"
    path.write_bytes(b'{"text": "b", "label": "neg"}\n' + content + b"\n")
    check_examples(*read_or_refused(lambda: labelled(path), str(path)))


ARRAYS = {
    "t/positions": torch.arange(2),
    "t/chances": torch.ones(2, dtype=torch.float64),
    "t/features": torch.rand(4, 3, dtype=torch.float64),
}


@fuzz
@given(hostile.json_files(header(ARRAYS)[0]).map(lambda head: packed(head, header(ARRAYS)[1])))
def test_kept_arrays(place: Path, content: bytes) -> None:
    path = place / "anchors.safetensors"
    path.write_bytes(content)
    anchors, _ = read_or_refused(lambda: Anchors.read(str(path)), str(path))
    assert anchors is None or all(len(own.positions) == len(own.chances) for own in anchors.tasks.values())
    kept, _ = read_or_refused(lambda: KeptPredictions(str(place)).read("anchors"), str(path))
    assert kept is None or sum(array.nbytes for array in kept.values()) <= len(content)
    scores = KnownScores({"t": str(path)})  # which measures again what it cannot read
    assert scores.take("t", np.arange(2)) is None
    assert str(path) in scores.problems[0]


def test_kept_arrays_as_written(place: Path) -> None:
    path = place / "whole.safetensors"
    path.write_bytes(save(ARRAYS))
    assert Anchors.read(str(path)).tasks["t"].features.shape == (4, 3)


def test_only_files_are_read(place: Path) -> None:
    """A pipe has no end: whoever opens it waits."""
    for name in ("config.json", "tokenizer.json", "model.safetensors", "vocab.txt"):
        directory = checkpoint(place, f"pipe-{name}")
        (directory / "model.safetensors").write_bytes(save(TENSORS))
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
        assert "pipe, socket or device" in (
            refused(lambda at=directory: Checkpoint.open(str(at)), str(directory)) or ""
        )
    os.mkfifo(place / "pipe.yaml")
    (place / "zero.csv").symlink_to("/dev/zero")
    assert refused(lambda: load_campaign(str(place / "pipe.yaml")), "pipe.yaml")
    assert refused(
        lambda: read_examples([str(place / "zero.csv")], Columns("text", None, "label"), ["a", "b"]), "zero.csv"
    )


def entry(**changes: Any) -> bytes:
    """A file of one tensor of 4 bytes, its entry changed."""
    return packed(json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode(), b"abcd")


def pair(first: list[int], second: list[int], size: int = 8) -> bytes:
    """A file of two tensors of 4 bytes each, at these places of so many bytes."""
    both = {name: {"dtype": "F32", "shape": [1], "data_offsets": at} for name, at in (("v", first), ("w", second))}
    return packed(json.dumps(both).encode(), bytes(size))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\xff" * 8 + b"{}", "truncated"),
        (bytes(8), "not valid JSON"),
        (packed(b"[" * 200_000, b""), "nested more than"),
        (packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "nested more than"),
        (packed(b"[1]", b""), "a list"),
        (packed(b"null", b""), "null"),
        (packed('{"a":1}'.encode("utf-16"), b""), "UTF-8"),
        (packed(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":{}}', b""), "twice"),
        (packed(b'{"a":{"data_offsets":' * 100_001, b""), "more than 100,000 tensors"),
        (packed(b'{"__metadata__":{"a":1}}', b""), "__metadata__"),
        (entry(dtype="Q7"), "has dtype 'Q7'"),
        (entry(dtype=["F32"]), "has dtype"),
        (entry(shape=[1.0]), "whole numbers"),
        (entry(shape=[1e30]), "whole numbers"),
        (entry(shape=[10**30]), "whole numbers"),
        (entry(shape=[-1, -1]), "whole numbers"),
        (entry(shape=[True]), "whole numbers"),
        (entry(shape=[float("inf")]), "whole numbers"),
        (entry(shape=[2**32, 2**32], data_offsets=[0, 0]), "has 0 bytes"),
        (entry(shape=[2**62] * 33), "33 dimensions"),
        (entry(data_offsets=[0, float("nan")]), "whole numbers"),
        (entry(data_offsets=[0, 1, 2]), "offsets"),
        (entry(data_offsets=[4, 0]), "offsets"),
        (entry(data_offsets=[0, 8]), "truncated"),
        (entry(more=1), "dtype, shape and offsets"),
        (pair([0, 4], [0, 4], 4), "share bytes"),
        (pair([0, 4], [2, 6], 6), "share bytes"),
        (pair([0, 4], [6, 10], 10), "belong to no tensor"),
        (pair([0, 4], [4, 8], 12), "belong to no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers(place: Path, content: bytes, message: str) -> None:
    path = place / "header.safetensors"
    path.write_bytes(content)
    assert message in (refused(lambda: read_all(path), str(path)) or "")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, "nested more than"),
        ("{a: " * 5000, "nested more than"),
        ("- " * 5000 + "a", "nested more than"),
        (BOMB, "aliases expanded"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a\n  <<: *a", "contains itself"),
        ("a: *nowhere", "undefined alias"),
        ("<<: 5", "for merging"),
        ("!!python/object/apply:os.system ['true']", "is not allowed"),
        ("a: !!python/tuple [1]", "is not allowed"),
        ("a: !!set {b}", "is not allowed"),
        ("a: !!binary x", "is not allowed"),
        ("a: !!int ''", "is no int"),
        ("a: !!float b", "is no float"),
        ("a: !!bool b", "is no bool"),
        ("a: " + "9" * 5000, "5,000 digits"),
        ("a: 0x" + "F" * 5000, "5,002 digits"),
        ("1: a\n0x1: b", "stands there twice"),
        ("[a]: b", "cannot be a key"),
        ('a: "\\ud800"', "half of a character"),
        ("a: b\0c", "special characters"),
        ("a: " + "x" * 2_000_000, "no such file has more"),
        ("a: 2024-99-99", "missing"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_yaml(place: Path, text: str, message: str) -> None:
    path = place / "x.yaml"
    path.write_text(text, errors="surrogatepass")
    assert message in (refused(lambda: load_recipe(str(path)), str(path)) or "")


@pytest.mark.parametrize(
    "path",
    [
        "a\0b",
        "x" * 300,
        "x" * 30_000,
        "\0" * 30_000,
        "~nobody-at-all/x",
        "zip://a::file:///nowhere.zip",
        "zzz://a",
        "\ud800",
        "/etc/passwd/x",
    ],
)
def test_paths(path: str) -> None:
    assert refused(lambda: Checkpoint.open(addresses.absolute(path)), "") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": 5}, "`architectures`"),
        ({"architectures": [["x"]]}, "`architectures`"),
        ({"architectures": ["os.system('x')"]}, "`architectures`"),
        ({"model_type": ["bert"]}, "`model_type`"),
        ({"id2label": ["a", "b"]}, "`id2label`"),
        ({"num_hidden_layers": 10**6}, "`num_hidden_layers`"),
        ({"text_config": {"n_layer": 10**6}}, "`text_config.n_layer`"),
        ({"vocab_size": 10**12}, "`vocab_size`"),
        ({"hidden_size": -16}, "`hidden_size`"),
        ({"num_labels": 10**9}, "`num_labels`"),
        ({"n_routed_experts": 10**9}, "`n_routed_experts`"),
        ({"hidden_size": float("nan")}, "`hidden_size`"),
    ],
)
def test_configurations(place: Path, changes: dict[str, Any], message: str) -> None:
    directory = checkpoint(place, "absurd", json.dumps(CONFIG | changes).encode())
    (directory / "model.safetensors").write_bytes(save(TENSORS))
    assert message in (refused(lambda: Checkpoint.open(str(directory)), str(directory)) or "")


def test_what_real_configurations_hold_is_read(place: Path) -> None:
    fine = {"vision_feature_layer": -2, "time_step_limit": [0.0, float("inf")], "num_labels": 3, "block_size": 4096}
    fine |= {"max_position_embeddings": 1 << 20, "num_experts": 512, "depths": [2, 2, 18, 2], "architectures": None}
    directory = checkpoint(place, "fine", json.dumps(CONFIG | fine).encode())
    (directory / "model.safetensors").write_bytes(save(TENSORS))
    assert Checkpoint.open(str(directory)).config["block_size"] == 4096


@pytest.mark.parametrize(
    "pattern", ["((a{1,60}){1,60})b", "(" * 5000, "a|" * 50_000, "(((", "(.*a)*(.*a)*(.*a)*(.*a)*(.*q)*z"]
)
def test_patterns_end(pattern: str) -> None:
    message = refused(lambda: matches(pattern, "a" * 60), "")
    assert message is None or len(message) < 1000


def test_a_kept_fact_that_was_changed_is_found_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    key = ("something", str(place))
    fact_cache.keep(key, "0123")
    (file,) = (place / "cache" / "mergequest" / "facts").iterdir()
    file.write_text(file.read_text().replace("0123", "0124"))
    monkeypatch.setattr(fact_cache, "_facts", {})
    assert fact_cache.recalled(key) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_startup_trials": "x"}, "n_startup_trials"),
        ({"n_startup_trials": -5}, "n_startup_trials"),
        ({"n_startup_trials": True}, "n_startup_trials"),
        ({"n_ei_candidates": 10**12}, "n_ei_candidates"),
        ({"prior_weight": float("inf")}, "prior_weight"),
        ({"multivariate": "yes"}, "multivariate"),
    ],
)
def test_arguments_of_samplers(changes: dict[str, Any], message: str) -> None:
    assert message in (refused(lambda: make_sampler("tpe", 0, changes), "") or "")


@pytest.mark.parametrize(
    ("place_in_file", "value"),
    [
        (("seed",), True),
        (("seed",), 2**70),
        (("search", "candidates"), True),
        (("search", "min_delta"), float("inf")),
        (("search", "methods"), [{"ties": {}}]),
        (("search", "methods", "ties", "scaling"), {"low": -1.7e308, "high": 1.7e308}),
        (("search", "methods", "ties", "scaling"), {"low": 0, "high": 1, "step": 1e-300}),
        (("search", "methods", "average"), {"scaling": 0.0}),
        (("search", "sampler_arguments", "n_startup_trials"), "x"),
        (("resources",), {"memory": float("inf")}),
        (("resources",), {"gpus": float("nan")}),
        (("directory",), "y" * 300),
        (("base",), "a\0b"),
        (("base",), "~nobody-at-all/x"),
    ],
    ids=str,
)
def test_settings(place: Path, place_in_file: tuple[str, ...], value: Any) -> None:
    path = place / "settings.yaml"
    changed = copy.deepcopy(CAMPAIGN)
    within: Any = changed
    for key in place_in_file[:-1]:
        within = within[key]
    within[place_in_file[-1]] = value
    path.write_text(yaml.safe_dump(changed))
    assert refused(lambda: load_campaign(str(path)), "") is not None


def test_stored_configurations_of_other_types(campaign: Path) -> None:
    path = campaign / "pool.json"
    path.write_text(json.dumps(POOL | {"configurations": {"one": CONFIG | {"architectures": True}}}))
    try:
        assert refused(lambda: _check_pool(campaign), str(path)) is not None
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("z.csv", b"text,label\n" + b"a," + b"9" * 20_000 + b"\n"),
        ("z.csv", b"9" * 20_000 + b",label\na,neg\n"),
        ("z.jsonl", json.dumps({"text": ["x" * 20_000], "label": "neg"}).encode()),
        ("z.parquet", TABLES["x.parquet"].replace(b"a bad one", b"a \xffad one")),
    ],
    ids=["long label", "long column", "long text", "not UTF-8"],
)
def test_data_in_messages(place: Path, name: str, content: bytes) -> None:
    path = place / name
    path.write_bytes(content)
    message = refused(lambda: read_examples([str(path)], Columns("text", None, "label"), ["neg", "pos"]), str(path))
    assert message is not None
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": 1e308}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "digits"),
        ({}, "no tensors"),
    ],
    ids=["rank 0", "factor without a finite product", "factor beyond floats", "no tensors"],
)
def test_adapters(place: Path, changes: dict[str, Any], message: str) -> None:
    base = checkpoint(place, "adapted")
    (base / "model.safetensors").write_bytes(save(TENSORS))
    directory = place / "adapter"
    directory.mkdir(exist_ok=True)
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS"} | changes
    (directory / "adapter_config.json").write_text(json.dumps(about))
    (directory / "adapter_model.safetensors").write_bytes(save(TENSORS if changes else {}))
    assert message in (refused(lambda: open_checkpoint(str(directory), str(base)), "adapter") or "")
