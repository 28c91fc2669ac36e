from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from merging.tasks import TextClassification, TextClassificationSettings, make_task

WORDS = ["good", "bad", "great", "awful", "film", "book", "story", "plot", "very", "not", "really", "so"]


def make_frame(count: int, classes: int = 3, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(1, 20))) for _ in range(count)]
    return pd.DataFrame({"text": texts, "label": generator.integers(0, classes, size=count)})


@pytest.fixture(scope="session")
def head(tiny_pool: dict[str, Path]) -> str:
    """A classifier with three classes."""
    return str(tiny_pool["two"])


@pytest.fixture
def frames() -> dict[str, pd.DataFrame]:
    return {
        "train": make_frame(60, seed=1),
        "validation": make_frame(50, seed=2),
        "test": make_frame(40, seed=3),
    }


@pytest.fixture
def make_text_task(tmp_path: Path, head: str) -> Callable[..., TextClassification]:
    """Writes frames as Parquet and makes their task: `make_text_task(frames, head=…, **settings)`."""

    def make(frames: dict[str, pd.DataFrame], head: str = head, **settings: object) -> TextClassification:
        data = {}
        for split, frame in frames.items():
            data[split] = str(tmp_path / f"{split}.parquet")
            frame.to_parquet(data[split])
        task = make_task("reviews", TextClassificationSettings(data=data, **settings), head)
        assert isinstance(task, TextClassification)
        return task

    return make
