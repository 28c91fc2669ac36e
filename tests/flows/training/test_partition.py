import numpy as np
import pandas as pd
import pytest

from flows.config.train_file import Partition
from flows.training.partition import dirichlet, strata, write_parts
from merging.errors import SettingsError
from merging.tasks import TextClassificationSettings

LABELS = np.random.default_rng(0).integers(0, 4, size=2000)


def shares(parts):
    """Of every part, its share of each class [parts, classes]."""
    counts = np.array([np.bincount(LABELS[part], minlength=4) for part in parts])
    return counts / counts.sum(0)


def test_every_example_is_in_one_part():
    parts = dirichlet(LABELS, 5, 0.3)
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))
    assert all(len(np.unique(LABELS[part])) > 1 for part in parts)
    assert all(np.array_equal(one, other) for one, other in zip(parts, dirichlet(LABELS, 5, 0.3), strict=True))
    assert not np.array_equal(parts[0], dirichlet(LABELS, 5, 0.3, seed=1)[0])


@pytest.mark.parametrize("concentration", [0.3, 2.0, 50.0])
def test_shares_have_the_variance_of_a_dirichlet(concentration):
    """Var = (1/K)(1 − 1/K) / (Kα + 1), over many draws."""
    found = np.concatenate([shares(dirichlet(LABELS, 3, concentration, seed)).ravel() for seed in range(150)])
    assert found.mean() == pytest.approx(1 / 3, abs=1e-9)
    assert found.var() == pytest.approx(2 / 9 / (3 * concentration + 1), rel=0.15)


def test_parts_without_two_classes_are_refused():
    with pytest.raises(SettingsError, match="concentration"):
        dirichlet(np.array([0, 0, 0, 1]), 3, 0.1)


def test_parts_are_files_of_the_same_columns(tmp_path):
    frame = pd.DataFrame({"text": [f"text {n}" for n in range(60)], "label": ["a", "b", "c"] * 20, "other": 1})
    frame.to_parquet(tmp_path / "all.parquet")
    task = TextClassificationSettings(data={"train": str(tmp_path / "all.parquet"), "validation": "v"})
    found = write_parts(task, Partition(task="emotion", parts=3), tmp_path)
    assert list(found) == ["emotion-1", "emotion-2", "emotion-3"]
    parts = [pd.read_parquet(settings.data["train"]) for settings in found.values()]
    whole = pd.concat(parts).sort_values("text", ignore_index=True)
    assert whole.equals(frame[["text", "label"]].sort_values("text", ignore_index=True))
    assert all(set(settings.data) == {"train"} for settings in found.values())


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"label": [["joy"], ["joy", "fear"], [], ["fear", "rage"], ["joy"]]}, "label"),
        ({"joy": [1, 1, 0, 0, 1], "fear": [0, 1, 0, 1, 0], "rage": [0, 0, 0, 1, 0]}, ["joy", "fear", "rage"]),
    ],
)
def test_of_several_labels_the_rarest_counts(columns, label):
    assert strata(pd.DataFrame(columns), label).tolist() == ["joy", "fear", "", "rage", "joy"]


def test_flags_in_lists_are_labels_by_their_places():
    flags = [np.array([True, False]), np.array([True, True]), np.array([False, False])]
    assert strata(pd.DataFrame({"label": flags}), "label").tolist() == ["0", "1", ""]


def test_parts_of_several_labels_lose_none(tmp_path):
    generator = np.random.default_rng(0)
    labels = [[name for name in "abcd" if generator.random() < 0.4] for _ in range(300)]
    frame = pd.DataFrame({"text": [f"text {n}" for n in range(300)], "label": labels})
    frame.to_parquet(tmp_path / "all.parquet")
    task = TextClassificationSettings(
        data={"train": str(tmp_path / "all.parquet"), "validation": "v"}, problem_type="multi_label_classification"
    )
    found = write_parts(task, Partition(task="emotion", parts=3, concentration=0.3), tmp_path)
    parts = [pd.read_parquet(settings.data["train"]) for settings in found.values()]
    together = {text: list(own) for part in parts for text, own in zip(part.text, part.label, strict=True)}
    assert together == dict(zip(frame.text, labels, strict=True))
    shares = np.array([[sum(name in own for own in part.label) / len(part) for name in "abcd"] for part in parts])
    assert np.ptp(shares, axis=0).max() > 0.2


@pytest.mark.parametrize(
    ("labels", "message"), [([0.5, 1.0], "numbers, not classes"), (["a", None], "lacks labels in 1")]
)
def test_what_is_no_class_is_refused(labels, message):
    with pytest.raises(SettingsError, match=message):
        strata(pd.DataFrame({"label": labels}), "label")
