"""Fine-tunes a base on a task, or on several together: a plain training loop for every kind of task that has logits."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import pad

from merging.checkpoints.checkpoint import CONFIG, Checkpoint
from merging.errors import TaskError
from merging.evaluation.live_models import best_device
from merging.io import addresses, atomic, documents, hashing, storage
from merging.optimization.schedule import bucketed, rate
from merging.tasks import TASKS, AnyTaskSettings, Batch, CausalLM, Task, make_task
from merging.tasks.head import IMAGE_PROCESSOR, load_image_processor, load_tokenizer, local_directory, quiet
from merging.tasks.likelihood import losses
from merging.tasks.task import IGNORED

RECORD = "training.json"

Progress = Callable[[int, int, float], None]
"""Called after every step with steps done, steps in all, and the step's loss."""


class TrainingSettings(BaseModel):
    """How models are fine-tuned: AdamW, no dropout, a linear warm-up and a linear decay, gradients clipped at norm 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int = Field(1, ge=1, description="Passes over the training split.")
    batch_size: int = Field(16, ge=1, description="Examples per step.")
    learning_rate: float = Field(2e-4, gt=0, description="AdamW's peak rate for the backbone.")
    head_factor: float = Field(
        10.0, gt=0, description="The head's rate over the backbone's; a language model's output layer is no head."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on weight matrices.")
    warm_up: float = Field(
        0.1, ge=0, le=1, description="Share of the steps in which the rate rises from 0; it falls to 0 in the rest."
    )
    autocast: bool = Field(False, description="Run the forward pass in bfloat16.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of a new head's weights and of the order of examples.")


@dataclass(frozen=True)
class Lesson:
    """A task to be trained on.

    Args:
        settings: The task, of a kind that has logits, with a train split.
        labels: Classes of the head; empty where the base's own head is trained. A head of the base that has other classes is
            replaced by a new one.
    """

    settings: AnyTaskSettings
    labels: Sequence[str] = ()

    @property
    def files(self) -> list[str]:
        """The files or folders of the train split.

        Raises:
            TaskError: There is none, or the kind of task has no logits.
        """
        data = getattr(self.settings, "data", {})
        if not TASKS[self.settings.kind][0].has_logits or "train" not in data:
            raise TaskError("training needs a task that gives logits, with a `train` split in its `data`")
        if not has_answers(self.settings):
            raise TaskError(
                "there is nothing to train on: the examples have no labels (`label` or `completion` is null)"
            )
        return [data["train"]] if isinstance(data["train"], str) else list(data["train"])

    def key(self) -> list[Any]:
        """What the trained weights depend on, JSON-like."""
        prints = [_data_fingerprint(file) for file in self.files]
        settings = self.settings.model_dump(mode="json", exclude={"data", "role"})
        return [prints[0] if len(prints) == 1 else prints, settings, list(self.labels)]


def has_answers(settings: AnyTaskSettings) -> bool:
    """Whether a task's examples have labels, or completions."""
    return settings.is_labelled and not getattr(settings, "is_unanswered", False)


@dataclass(frozen=True)
class Trained:
    """What came of training.

    Args:
        path: The directory that was made.
        loss: Mean loss over the last epoch's steps.
        seconds: Wall time; of the run that trained it, where it was there already.
        reused: Whether it was there already.
        places: Task → its Hugging Face directory: `path`, or one below it where tasks have heads of their own.
    """

    path: Path
    loss: float
    seconds: float
    reused: bool
    places: Mapping[str, Path] = field(default_factory=dict)


def train_member(
    base: Path | str,
    task: AnyTaskSettings,
    out: Path,
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
    labels: Sequence[str] = (),
) -> Trained:
    """Fine-tunes the base on a task's training split into an ordinary Hugging Face directory; see `train_together`.

    Args:
        base: The base model's directory or address.
        task: The task.
        out: The directory to make.
        settings: How to train.
        progress: Told of every step.
        labels: Classes of a new head; empty where the base's own head is trained.

    Raises:
        MergequestError: See `train_together`.
    """
    return train_together(base, {out.name: Lesson(task, labels)}, out, settings, progress)


def train_together(
    base: Path | str,
    lessons: Mapping[str, Lesson],
    out: Path,
    settings: TrainingSettings | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Fine-tunes one model on the training splits of one or several tasks, unless that was done with the same inputs.

    Tasks of one kind with the same classes have one head, and their examples are mixed in every batch. Others have a head
    each above the same backbone, and steps of all in a random order. Every head becomes a Hugging Face directory of its own.
    The same inputs give the same bits on a CPU with one thread; the caller's random state is left alone.

    Args:
        base: The base model's directory or address.
        lessons: Task's name → what is trained on.
        out: The directory to make; it appears whole or not at all, and replaces one that was made from other inputs.
        settings: How to train.
        progress: Told of every step.

    Raises:
        CheckpointError: The base is missing or damaged.
        TaskError: The data are unusable, or a kind of task has no logits.
        StorageError: There is no right or no space to write.
    """
    settings = settings or TrainingSettings()
    groups = _groups(lessons)
    below = {name: out if len(groups) == 1 else out / group[0] for group in groups for name in group}
    keys = [lesson.key() for _, lesson in sorted(lessons.items())]
    whole = keys[0] if len(keys) == 1 else [[name, *key] for name, key in zip(sorted(lessons), keys, strict=True)]
    key = hashing.fingerprint([Checkpoint.open(str(base)).fingerprint, *whole, settings.model_dump()])
    record = out / RECORD
    if record.exists():
        known = documents.read_as(str(record), lambda v: (str(v["key"]), float(v["loss"]), float(v["seconds"])))
        if known[0] == key:
            return Trained(out, known[1], known[2], reused=True, places=below)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as place:
        heads = []
        for number, group in enumerate(groups):
            torch.manual_seed(settings.seed)
            start = Path(place) / str(number)
            save_start(base, lessons[group[0]].settings, lessons[group[0]].labels, start)
            heads.append(_Head(start, [make_task(name, lessons[name].settings, str(start)) for name in group]))
        loss, seconds = _train(heads, settings, progress)
        with atomic.new_dir(str(out)) as directory, quiet():
            for head, group in zip(heads, groups, strict=True):
                target = directory if len(groups) == 1 else directory / group[0]
                head.model.save_pretrained(target)
                _save_preprocessor(head.start, target)
            note = {
                "key": key,
                "loss": loss,
                "seconds": seconds,
                "examples": sum(len(head.examples) for head in heads),
                "settings": settings.model_dump(),
                "tasks": sorted(lessons),
            }
            atomic.write_json(str(directory / RECORD), note)
    return Trained(out, loss, seconds, reused=False, places=below)


def save_start(base: Path | str, task: AnyTaskSettings, labels: Sequence[str], out: Path) -> None:
    """Writes the base with a head for a kind of task, and what prepares its inputs, as a checkpoint that a task opens.

    Args:
        base: The base model's directory or address.
        task: The task that the head is for.
        labels: Classes of the head; empty for the base's own. A new head's weights come from torch's random state.
        out: The directory to write.

    Raises:
        TaskError: transformers cannot load the base so.
    """
    import transformers

    loader = getattr(transformers, TASKS[task.kind][0].model_class)  # type: ignore[attr-defined]
    source = local_directory(str(base))
    how: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    if labels:
        how |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
        if problem := getattr(task, "problem_type", None):
            how["problem_type"] = problem
    try:
        with quiet():
            model = loader.from_pretrained(source, **how)
            known = documents.read_object(addresses.join(source, CONFIG)).get("id2label")
            if labels and known and [known[k] for k in sorted(known, key=int)] != list(labels):
                _renew_head(model)
            model.save_pretrained(out)
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(f"{base} cannot be trained as a {task.kind}: {addresses.in_words(error)}") from error
    _save_preprocessor(Path(source), out)


@torch.no_grad()
def _renew_head(model: Any) -> None:
    """Random weights for all that is not the backbone: the base's head was another's."""
    fresh = dict(type(model)(model.config).named_parameters())
    for name, value in model.named_parameters():
        if not name.startswith(_backbone_prefix(model)):
            value.copy_(fresh[name])


def _backbone_prefix(model: Any) -> str:
    """What the backbone's parameters are named by.

    Nothing where the model holds its parts itself, as T5 does, and of a language model: its output layer was pretrained with
    all the rest, whether it is tied to the embeddings or not.
    """
    whole = model.base_model is model or model.get_output_embeddings() is not None
    return "" if whole else f"{model.base_model_prefix}."


def _save_preprocessor(source: Path, out: Path) -> None:
    load = load_image_processor if (source / IMAGE_PROCESSOR).exists() else load_tokenizer
    load(str(source)).save_pretrained(out)


def _data_fingerprint(path: str) -> str:
    """Content hash of a file, or of all files below a folder."""
    if not storage.is_dir(path):
        return hashing.file_fingerprint(path)
    files = storage.list_files(path, hidden=False)
    return hashing.fingerprint([[name, hashing.file_fingerprint(addresses.join(path, name))] for name in sorted(files)])


def _groups(lessons: Mapping[str, Lesson]) -> list[list[str]]:
    """Tasks by head: those of one kind and the same classes together."""
    by_head: dict[Any, list[str]] = {}
    for name, lesson in lessons.items():
        head = (lesson.settings.kind, getattr(lesson.settings, "problem_type", None), tuple(lesson.labels))
        by_head.setdefault(head, []).append(name)
    return list(by_head.values())


class _Head:
    """The tasks of one head, their examples, and the model that has it.

    Args:
        start: The checkpoint that the tasks are bound to.
        tasks: The tasks.
    """

    def __init__(self, start: Path, tasks: Sequence[Task]) -> None:
        self.start = start
        # without dropout: so few passes overfit nothing, and a tenth of the time is saved
        self.model: Any = tasks[0].load_model()
        self.task = tasks[0]
        self.likelihood = self.task.likelihood(self.model)
        self.examples = [example for task in tasks for example in _examples(task)]

    def share(self, backbone: nn.Module) -> None:
        """Has the model compute with another's backbone, as far as both have the same parameters."""
        own: nn.Module = self.model.base_model
        there = dict(backbone.named_modules())
        for name, module in own.named_modules():
            for local, value in module._parameters.items():
                other = there[name]._parameters.get(local) if name in there else None
                if value is not None and other is not None and other.shape == value.shape:
                    module._parameters[local] = other

    def batches(self, size: int, generator: np.random.Generator) -> list[np.ndarray]:
        """Positions of one epoch's batches."""
        lengths = np.array([1 if example.mask is None else int(example.mask.sum()) for example in self.examples])
        return bucketed(lengths, size, generator)

    def loss(self, places: np.ndarray, device: torch.device, *, autocast: bool) -> Tensor:
        """Mean loss of a batch."""
        left = self.task.kind == CausalLM.kind
        batch = joined([self.examples[place] for place in places], left=left).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = self.task.logits(self.model, batch).float()
        labels = batch.labels
        if self.likelihood == "categorical":
            judged = labels >= 0
            logits, labels = logits[judged], labels[judged]
        return losses(self.likelihood, logits, labels).mean()


def _examples(task: Task) -> list[Batch]:
    """A task's training examples, each a batch of its own, in the order of its file."""
    return sorted(task.batches("train", 0, task.size("train"), 1), key=lambda batch: int(batch.indices))


def _train(heads: Sequence[_Head], settings: TrainingSettings, progress: Progress | None) -> tuple[float, float]:
    """Trains the heads' models; gives the mean loss of the last epoch and the seconds."""
    started = time.monotonic()
    device = best_device()
    for head in heads[1:]:
        head.share(heads[0].model.base_model)
    for head in heads:
        head.model.to(device)
    generator = np.random.default_rng(settings.seed)
    steps: list[tuple[_Head, np.ndarray]] = []
    for _ in range(settings.epochs):
        epoch = [(head, places) for head in heads for places in head.batches(settings.batch_size, generator)]
        order = generator.permutation(len(epoch)) if len(heads) > 1 else range(len(epoch))
        steps += [epoch[place] for place in order]
    optimizer = _optimizer([head.model for head in heads], settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(steps), settings.warm_up))
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    seen = []
    for step, (head, places) in enumerate(steps, start=1):
        loss = head.loss(places, device, autocast=settings.autocast)
        if not loss.isfinite():
            raise TaskError(
                f"training on '{head.task.name}' diverged in step {step} of {len(steps)}: lower `learning_rate` "
                f"({settings.learning_rate:g})"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([value for value in parameters if value.grad is not None], 1.0)
        optimizer.step()
        scheduler.step()
        seen.append(loss.item())
        if progress:
            progress(step, len(steps), seen[-1])
    for head in heads:
        head.model.to("cpu")
    return float(np.mean(seen[-(len(steps) // settings.epochs) :])), time.monotonic() - started


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


def _optimizer(models: Sequence[Any], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW with heads faster than the backbone, and no decay on biases and LayerNorm; shared parameters count once."""
    groups, seen = [], set[int]()
    for model in models:
        backbone = _backbone_prefix(model)
        for name, value in model.named_parameters():
            if id(value) not in seen:
                seen.add(id(value))
                faster = 1.0 if name.startswith(backbone) else settings.head_factor
                groups.append(
                    {
                        "params": [value],
                        "lr": settings.learning_rate * faster,
                        "weight_decay": settings.weight_decay if value.ndim > 1 else 0.0,
                    }
                )
    return torch.optim.AdamW(groups, fused=True)
