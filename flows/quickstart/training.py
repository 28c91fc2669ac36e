"""Fine-tunes a member of a quick start's pool: a plain training loop for every kind of task, the same numbers at every run."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from merging.checkpoints.checkpoint import Checkpoint
from merging.io import atomic, documents, hashing
from merging.tasks import AnyTaskSettings, Batch, CausalLM, Task, make_task
from merging.tasks.head import IMAGE_PROCESSOR, load_image_processor, load_tokenizer, quiet

RECORD = "training.json"
IGNORED = -100
MODEL_CLASSES: Mapping[str, str] = {
    "text_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
    "causal_lm": "AutoModelForCausalLM",
}
"""Kind of task → the class whose new head is trained."""
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
        autocast: Whether the forward pass runs in bfloat16.
        seed: Of the head's weights and of the order of examples.
    """

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 2e-4
    head_factor: float = 10.0
    weight_decay: float = 0.01
    warm_up: float = 0.1
    autocast: bool = False
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
    task: AnyTaskSettings,
    out: Path,
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
    labels: Sequence[str] = (),
) -> Trained:
    """Fine-tunes the base on a task's training split into an ordinary Hugging Face directory, unless it is there already.

    Runs on the CPU with as many threads as the caller gave torch, and leaves the caller's random state alone.
    The same inputs and one thread give the same bits.

    Args:
        base: The base model's directory.
        task: The task, of a kind that gives logits of classes or tokens; the path of its train split is local.
        out: The directory to make; it appears whole or not at all; one made from other inputs is replaced.
        settings: How to train.
        progress: Told of every step.
        labels: The new head's classes; empty where the base's own head is trained.

    Raises:
        CheckpointError: The base is missing or damaged.
        TaskError: The data are unusable.
        StorageError: There is no right or no space to write.
    """
    settings = settings or TrainingSettings()
    train = cast("str", task.data["train"])  # type: ignore[union-attr]
    prepared = [hashing.file_fingerprint(train), task.model_dump(mode="json", exclude={"data"}), list(labels)]
    key = hashing.fingerprint([Checkpoint.open(str(base)).fingerprint, *prepared, asdict(settings)])
    record = out / RECORD
    if record.exists():
        known = documents.read_as(str(record), lambda v: (str(v["key"]), float(v["loss"]), float(v["seconds"])))
        if known[0] == key:
            return Trained(out, known[1], known[2], reused=True)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as start:
        torch.manual_seed(settings.seed)
        _save_start(base, task.kind, labels, Path(start))
        return _train(make_task(out.name, task, start), out, settings, progress, key)


def _save_start(base: Path, kind: str, labels: Sequence[str], out: Path) -> None:
    """The base with a new head, and what prepares its inputs, as a checkpoint that a task opens."""
    import transformers

    head: dict[str, Any] = {}
    if labels:
        head = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    with quiet():
        model = getattr(transformers, MODEL_CLASSES[kind]).from_pretrained(
            base, dtype=torch.float32, local_files_only=True, use_safetensors=True, **head
        )
        model.save_pretrained(out)
    _save_preprocessor(base, out)


def _save_preprocessor(source: Path, out: Path) -> None:
    load = load_image_processor if (source / IMAGE_PROCESSOR).exists() else load_tokenizer
    load(str(source)).save_pretrained(out)


def _train(task: Task, out: Path, settings: TrainingSettings, progress: Progress | None, key: str) -> Trained:
    started = time.monotonic()
    model: Any = task.load_model()  # without dropout: so few passes overfit nothing, and a tenth of the time is saved
    examples = sorted(task.batches("train", 0, task.size("train"), 1), key=lambda batch: int(batch.indices))
    lengths = np.array([1 if example.mask is None else int(example.mask.sum()) for example in examples])
    generator = np.random.default_rng(settings.seed)
    batches = [b for _ in range(settings.epochs) for b in bucketed(lengths, settings.batch_size, generator)]
    optimizer = _optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches), settings.warm_up))
    losses = []
    for step, chosen in enumerate(batches, start=1):
        batch = joined([examples[i] for i in chosen], left=task.kind == CausalLM.kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            logits = task.logits(model, batch)
        judged = batch.labels >= 0
        loss = cross_entropy(logits[judged].float(), batch.labels[judged])
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
    with atomic.new_dir(str(out)) as directory, quiet():
        model.save_pretrained(directory)
        _save_preprocessor(Path(task.head), directory)
        note = {
            "key": key,
            "loss": last,
            "seconds": seconds,
            "examples": len(examples),
            "settings": asdict(settings),
        }
        atomic.write_json(str(directory / RECORD), note)
    return Trained(out, last, seconds, reused=False)


def joined(examples: Sequence[Batch], *, left: bool = False) -> Batch:
    """Batches of one example each as one batch, padded to the longest: inputs by 0, which the mask hides, labels by −100.

    Args:
        examples: At least one, of the same inputs: sequences [1, S], or tensors [1, …] of one shape.
        left: Whether padding comes before a sequence.
    """
    inputs = {name: _stacked([example.inputs[name] for example in examples], 0, left) for name in examples[0].inputs}
    masks = [example.mask for example in examples if example.mask is not None]
    return Batch(
        inputs,
        _stacked([example.labels for example in examples], IGNORED, left),
        torch.cat([example.indices for example in examples]),
        _stacked(masks, 0, left) if masks else None,
    )


def _stacked(parts: Sequence[Tensor], padding: int, left: bool) -> Tensor:
    """Tensors [1, S] as [N, longest S]; others as they are [N, …]."""
    if parts[0].dim() != 2:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    return torch.cat(
        [pad(part, (gap, 0) if left else (0, gap), value=padding) for part, gap in zip(parts, missing, strict=True)]
    )


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
