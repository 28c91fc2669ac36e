import json
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from merging.errors import TaskError
from merging.tasks.labelled_texts import Columns, read_examples

CLASSES = ["negative", "neutral", "positive"]
COLUMNS = Columns("text", None, "label")
FRAME = pd.DataFrame({"text": ["a, b", 'say "c"', "NA", "12"], "label": [0, 2, 1, 0], "other": [1.5, 2.0, 3.0, 4.0]})


def write(path: Path, frame: pd.DataFrame = FRAME) -> str:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "ndjson"])
def test_formats_agree(tmp_path, suffix):
    examples = read_examples([write(tmp_path / f"x.{suffix}")], COLUMNS, CLASSES)
    assert examples.texts == (["a, b", 'say "c"', "NA", "12"],)
    assert examples.labels.tolist() == [0, 2, 1, 0]


def test_several_files_follow_each_other(tmp_path):
    paths = [write(tmp_path / "a.csv"), write(tmp_path / "b.parquet", FRAME[:2])]
    examples = read_examples(paths, COLUMNS, CLASSES)
    assert len(examples) == 6
    assert examples.labels.tolist() == [0, 2, 1, 0, 0, 2]


def test_reads_any_file_system():
    with fsspec.open("memory://data/x.jsonl", "w") as file:
        file.write('{"text": "a", "label": 0}\n\n{"text": "b", "label": 1}\n')
    assert read_examples(["memory://data/x.jsonl"], COLUMNS, CLASSES).labels.tolist() == [0, 1]


def test_pairs_of_texts(tmp_path):
    frame = FRAME.rename(columns={"text": "premise"}).assign(hypothesis=["w", "x", "y", "z"])
    examples = read_examples([write(tmp_path / "x.csv", frame)], Columns("premise", "hypothesis", "label"), CLASSES)
    assert examples.texts[1] == ["w", "x", "y", "z"]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_labels_by_name(tmp_path, suffix):
    frame = FRAME.assign(label=["positive", "negative", "neutral", "positive"])
    assert read_examples([write(tmp_path / f"x.{suffix}", frame)], COLUMNS, CLASSES).labels.tolist() == [
        2,
        0,
        1,
        2,
    ]


def test_labels_stored_as_floats_and_categories(tmp_path):
    floats = write(tmp_path / "x.parquet", FRAME.astype({"label": float}))
    assert read_examples([floats], COLUMNS, CLASSES).labels.tolist() == [0, 2, 1, 0]
    names = pd.Categorical(["neutral", "neutral", "positive", "negative"])
    categories = write(tmp_path / "y.parquet", FRAME.assign(label=names))
    assert read_examples([categories], COLUMNS, CLASSES).labels.tolist() == [1, 1, 2, 0]


def test_integers_are_names_where_names_are_numbers(tmp_path):
    path = write(tmp_path / "x.csv", FRAME.assign(label=[1, 2, 3, 1]))
    assert read_examples([path], COLUMNS, ["1", "2", "3"]).labels.tolist() == [0, 1, 2, 0]


def test_labels_outside_the_head_are_named_and_counted(tmp_path):
    path = write(tmp_path / "x.csv", FRAME.assign(label=["positive", "angry", "angry", "sad"]))
    with pytest.raises(
        TaskError, match=r"'angry' \(2 examples\), 'sad' \(1 examples\).*'negative', 'neutral'"
    ) as error:
        read_examples([path], COLUMNS, CLASSES)
    assert "x.csv" in str(error.value)


@pytest.mark.parametrize("label", [3, -1, 0.5, None, "3"])
def test_a_label_that_is_no_class(tmp_path, label):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": label}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(TaskError, match="outside the head's 3 classes"):
        read_examples([str(path)], COLUMNS, CLASSES)


def test_texts_missing_or_no_strings(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"label": 1}\n{"text": 7, "label": 9}\n')
    with pytest.raises(TaskError, match=r"no text in 2 of 3 rows \(first in row 2") as error:
        read_examples([str(path)], COLUMNS, CLASSES)
    assert "outside the head" in str(error.value)  # all that is wrong, at once


def test_empty_field_of_a_csv_is_missing(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,0\n,1\n")
    with pytest.raises(TaskError, match="no text in 1 of 2 rows"):
        read_examples([str(path)], COLUMNS, CLASSES)


def test_one_class(tmp_path):
    with pytest.raises(TaskError, match="all 4 examples have the label 'neutral'"):
        read_examples([write(tmp_path / "x.csv", FRAME.assign(label=1))], COLUMNS, CLASSES)


def test_no_rows(tmp_path):
    with pytest.raises(TaskError, match="there are no rows"):
        read_examples([write(tmp_path / "x.parquet", FRAME[:0])], COLUMNS, CLASSES)
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="there are no rows"):
        read_examples([str(tmp_path / "x.jsonl")], COLUMNS, CLASSES)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = Path(write(tmp_path / f"x.{suffix}"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_examples([str(path)], COLUMNS, CLASSES).texts == (FRAME["text"].tolist(),)


def test_halves_of_characters_are_no_text(tmp_path):
    """No tokenizer reads them."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "\\ud800b", "label": 1}\n')
    with pytest.raises(TaskError, match=r"no text in 1 of 2 rows \(first in row 2"):
        read_examples([str(path)], COLUMNS, CLASSES)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_missing_column(tmp_path, suffix):
    with pytest.raises(TaskError, match=r"has no column 'review', 'stars'; it has 'text', 'label', 'other'"):
        read_examples([write(tmp_path / f"x.{suffix}")], Columns("review", None, "stars"), CLASSES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1 but not really", "cannot be read as parquet"),
        ("x.csv", b"", "cannot be read as csv"),
        ("x.csv", b"text,label\n\xff\xfe\xfa,0\n", "cannot be read as csv"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": ', "line 2 is not valid JSON"),
        ("x.jsonl", b"[1, 2]\n", "line 1 holds a list"),
        ("x.jsonl", b"\xff\xfe", "cannot be read as jsonl"),
        ("x.xlsx", b"", r"the format is not known; name a file that ends in \.parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_examples([str(tmp_path / name)], COLUMNS, CLASSES)


def test_missing_file(tmp_path):
    with pytest.raises(TaskError, match=r"nowhere\.csv: it does not exist"):
        read_examples([str(tmp_path / "nowhere.csv")], COLUMNS, CLASSES)
