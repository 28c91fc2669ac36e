import numpy as np
import pandas as pd
import pytest

from flows.config.train_file import Partition
from flows.training.partition import dirichlet, write_parts
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
