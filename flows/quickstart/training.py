"""Fine-tunes a member of the quick start's pool: a plain training loop, the same numbers at every run."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flows.quickstart.data import LABELS
from merging.checkpoints.checkpoint import Checkpoint
from merging.io import storage
from merging.tasks.head import quiet

RECORD = "training.json"
BUCKET = 16
"""Batches whose examples are sorted by length together: enough to save padding, few enough to stay random."""

Progress = Callable[[int, int, float], None]
"""Called after every step with steps done, steps in all, and the step's loss."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a member is fine-tuned.

    Args:
        epochs: Passes over the training split.
        batch_size: Examples a step.
        learning_rate: AdamW's peak rate for the encoder.
        head_factor: The head's rate over the encoder's.
        weight_decay: AdamW's, on weight matrices.
        warm_up: Share of the steps in which the rate rises from 0; it falls to 0 in the rest.
        max_length: Tokens a sentence is cut to.
        seed: Of the head's weights and of the order of examples.
    """

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 2e-4
    head_factor: float = 10.0
    weight_decay: float = 0.01
    warm_up: float = 0.1
    max_length: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What came of training.

    Args:
        path: The member's Hugging Face directory.
        loss: Mean cross-entropy over the last epoch's steps.
        seconds: Wall time; of the run that trained it, where it was there already.
        reused: Whether it was there already.
    """

    path: Path
    loss: float
    seconds: float
    reused: bool


def train_member(
    base: Path,
    train: Path,
    out: Path,
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Fine-tunes the base on one domain into an ordinary Hugging Face directory, unless it is there already.

    Runs on the CPU with as many threads as the caller gave torch, and leaves the caller's random state alone.
    The same inputs and one thread give the same bits.

    Args:
        base: The base model's directory.
        train: Parquet file with columns `text` and `label`, an index into `LABELS`.
        out: The directory to make; it appears whole or not at all; one made from other inputs is replaced.
        settings: How to train.
        progress: Told of every step.

    Raises:
        CheckpointError: The base is missing or damaged.
        StorageError: There is no right or no space to write.
    """
    settings = settings or TrainingSettings()
    key = storage.fingerprint(
        [Checkpoint.open(str(base)).fingerprint, storage.file_fingerprint(str(train)), asdict(settings)]
    )
    record = out / RECORD
    if record.exists():
        known = storage.read_as(str(record), lambda v: (str(v["key"]), float(v["loss"]), float(v["seconds"])))
        if known[0] == key:
            return Trained(out, known[1], known[2], reused=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _train(base, train, out, settings, progress, key)


def _train(
    base: Path, train: Path, out: Path, settings: TrainingSettings, progress: Progress | None, key: str
) -> Trained:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    started = time.monotonic()
    frame = pd.read_parquet(train)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    model.eval()  # no dropout: a pass over the data overfits nothing, and a tenth of the time is saved
    encoded = tokenizer(frame["text"].tolist(), truncation=True, max_length=settings.max_length, padding=False)
    labels = torch.from_numpy(frame["label"].to_numpy(np.int64, copy=True))
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    generator = np.random.default_rng(settings.seed)
    batches = [b for _ in range(settings.epochs) for b in bucketed(lengths, settings.batch_size, generator)]
    optimizer = _optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches), settings.warm_up))
    losses = []
    for step, chosen in enumerate(batches, start=1):
        rows = [{name: encoded[name][i] for name in encoded} for i in chosen]
        inputs: dict[str, Tensor] = dict(tokenizer.pad(rows, return_tensors="pt"))
        loss = cross_entropy(model(**inputs).logits, labels[torch.from_numpy(chosen)])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if progress:
            progress(step, len(batches), losses[-1])
    last = float(np.mean(losses[-(len(batches) // settings.epochs) :]))
    seconds = time.monotonic() - started
    with storage.new_dir(str(out)) as directory, quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        note = {
            "key": key,
            "loss": last,
            "seconds": seconds,
            "examples": len(frame),
            "settings": asdict(settings),
        }
        storage.write_json(str(directory / RECORD), note)
    return Trained(out, last, seconds, reused=False)


def bucketed(lengths: np.ndarray, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Every example once, in random batches of similar length.

    Args:
        lengths: Tokens of each example [N].
        batch_size: Examples a batch; the last may have fewer.
        generator: Of the order.

    Returns:
        Positions of each batch's examples.
    """
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = order[start : start + batch_size * BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def _optimizer(model: Any, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW with the head faster than the encoder, and no decay on biases and LayerNorm."""
    encoder = f"{model.base_model_prefix}."
    groups = [
        {
            "params": [value],
            "lr": settings.learning_rate * (1.0 if name.startswith(encoder) else settings.head_factor),
            "weight_decay": settings.weight_decay if value.ndim > 1 else 0.0,
        }
        for name, value in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, fused=True)


def _rate(step: int, steps: int, warm_up: float) -> float:
    """The share of the peak rate at a step: linear up, then linear down to 0."""
    rising = max(1, round(steps * warm_up))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))
