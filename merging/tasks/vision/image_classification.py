"""Images in classes."""

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from merging.checkpoints.models.parameter_names import Loading
from merging.errors import TaskError
from merging.io import hashing, storage
from merging.tasks.classification import classified, measured
from merging.tasks.head import blank_model, class_names, load_image_processor, load_model
from merging.tasks.metrics import METRICS, is_mean
from merging.tasks.predictions import Predictions
from merging.tasks.task import Batch, Score, Split, Task, TaskSettings, register, score_of

if TYPE_CHECKING:
    from merging.tasks.vision.pictures import Images

MODEL_CLASS = "AutoModelForImageClassification"
MAX_ASPECT = 100
"""Length of an image by its width: a processor that resizes the shorter side would make too much of more."""
KEPT = 1 << 30
"""Bytes of prepared images of a task that stay in memory from candidate to candidate."""

Corruption = Literal["motion_blur", "impulse_noise", "gaussian_noise", "pixelate", "spatter", "contrast", "jpeg"]


class ImageClassificationSettings(TaskSettings):
    """Images in classes, from Parquet files with encoded images or from folders with a folder for each class."""

    kind: Literal["image_classification"] = Field("image_classification", description="image_classification.")
    data: dict[Split, str | Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1,
        description="Split (train, validation, test) → Parquet file, folder of class folders, or a list of these.",
    )
    image: str = Field("image", description="Column of the encoded image: bytes, or Hugging Face's Image feature.")
    label: str | None = Field(
        "label",
        description="Column of the label: a class's name, or its position in the head; null for unlabelled calibration data.",
    )
    labels: list[str] | None = Field(
        None, min_length=2, description="Names of the classes in the head's order; default: the head's `id2label`."
    )
    metric: str = Field("accuracy", description=f"What is maximised: {', '.join(METRICS)}.")
    corruption: Corruption | None = Field(
        None, description="Corrupt validation and test images, for a table of robustness beside the task itself."
    )
    severity: int = Field(3, ge=1, le=5, description="Of the corruption.")
    batch_size: int = Field(32, ge=1, description="Images per step of evaluation; does not change the score.")

    @model_validator(mode="after")
    def _labels_where_judged(self) -> "ImageClassificationSettings":
        if self.label is None and set(self.data) != {"train"}:
            raise ValueError(
                "`label: null` is for calibration data, a train split alone: nothing is judged without labels"
            )
        return self

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        try:
            METRICS[name]
        except TaskError as error:
            raise ValueError(str(error)) from error
        return name


class ImageClassification(Task):
    """An image classification task; see `Task`."""

    kind: ClassVar[str] = "image_classification"
    has_predictions: ClassVar[bool] = True

    def __init__(self, name: str, settings: ImageClassificationSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: ImageClassificationSettings = settings
        self._images: dict[Split, Images] = {}
        self._prepared: dict[tuple[Split, int], Tensor] = {}
        self._held = 0

    def check(self) -> list[str]:
        """Reads and decodes all splits, the head's classes and its processor; see `Task.check`."""
        _ = self._classes
        self.blank_model()
        extents: dict[tuple[int, ...], tuple[Split, int]] = {}
        for split in self.settings.data:
            images = self._split(split)
            for place in range(len(images)):
                try:
                    extents.setdefault(images.decode(place).shape, (split, place))
                except TaskError as error:
                    raise self._error(f"{split}: {error}") from error
        self._check_processor(extents)
        lacking = {"train": "no statistics can be computed for it", "test": "its winner is known on validation only"}
        return [
            f"task '{self.name}' has no {split} split: {lack}"
            for split, lack in lacking.items()
            if split not in self.settings.data
        ]

    def _check_processor(self, extents: Mapping[tuple[int, ...], tuple[Split, int]]) -> None:
        """Whether the smallest, largest, widest and tallest images become pixels of one shape.

        Raises:
            TaskError: They do not, or cannot be prepared.
        """
        by = (lambda x: x[0] * x[1], lambda x: -x[0] * x[1], lambda x: x[0] / x[1], lambda x: x[1] / x[0])
        shapes = set()
        for key in by:
            extent = min(extents, key=key)
            split, place = extents[extent]
            longest, shortest = max(extent[:2]), min(extent[:2])
            if longest > MAX_ASPECT * shortest:
                raise self._error(
                    f"{split}: {self._split(split).names[place]} is {longest} by {shortest} pixels, longer than "
                    f"{MAX_ASPECT} times its width: crop it"
                )
            try:
                shapes.add(tuple(self._pixels(split, place).shape))
            except TaskError:
                raise
            except Exception as error:  # a processor's own
                raise self._error(
                    f"the processor of {self.head} cannot prepare {self._split(split).names[place]}: {str(error)[:300]}"
                ) from error
        if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
            raise self._error(
                f"the processor of {self.head} gives images of shapes {sorted(map(list, shapes))}: one shape is needed, "
                "[channels, height, width]. Let it resize or crop"
            )

    def load_model(self) -> nn.Module:
        """The head's checkpoint as `AutoModelForImageClassification`; see `Task.load_model`."""
        return self.load_skeleton(())

    def load_skeleton(self, merged: Collection[str]) -> nn.Module:
        """See `Task.load_skeleton`."""
        return load_model(self.head, MODEL_CLASS, base=self.base, hollow=merged)

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """See `Task.blank_model`."""
        return blank_model(self.head, MODEL_CLASS, self.base)

    def size(self, split: Split) -> int:
        """See `Task.size`."""
        return len(self._split(split)) if split in self.settings.data else 0

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of images, labels, corruption and the processor's settings."""
        images = self._split(split)
        digest = hashlib.sha256()
        for content in images.encoded:
            digest.update(storage.read_bytes(content) if isinstance(content, str) else content)
        settings = self.settings.model_dump(mode="json", include={"corruption", "severity", "metric"})
        return hashing.fingerprint(
            [digest.hexdigest(), images.labels.tolist(), settings, self._processor.to_json_string()]
        )

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`. Loss and metric are computed in float64 from the model's logits."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        places, size, parts = self._order(split)[positions], self.settings.batch_size, []
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for first in range(0, len(places), size):
                batch = self._batch(split, places[first : first + size])
                parts.append(self.logits(model, batch.to(device)).double())
        logits = torch.cat(parts).cpu()
        if wrong := int((~logits.isfinite().all(dim=1)).sum()):
            raise self._error(f"the model gave NaN or Inf for {wrong} of {len(logits)} {split} images")
        labels, log_probabilities = self._split(split).labels[places], log_softmax(logits, dim=1).numpy()
        return classified(self.settings.metric, labels, log_probabilities, time.perf_counter() - started)

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        metric = self.settings.metric
        return score_of(predictions, metric, measured=None if is_mean(metric) else measured(metric, predictions))

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """See `Task.batches`."""
        order = self._order(split)[start:stop]
        for first in range(0, len(order), batch_size):
            yield self._batch(split, order[first : first + batch_size])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Unnormalised log-probabilities [N, C]."""
        logits: Tensor = model(**batch.inputs).logits
        return logits

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The backbone's last hidden states [N, S, D]; of a convolutional one, its last feature map, place by place."""
        backbone: Any = model.base_model
        states: Tensor = backbone(**batch.inputs).last_hidden_state
        return states if states.dim() == 3 else states.flatten(2).transpose(1, 2)

    @cached_property
    def _processor(self) -> Any:
        return load_image_processor(self.head, self.base)

    @cached_property
    def _classes(self) -> Sequence[str]:
        try:
            return class_names(self.head, self.settings.labels, self.base, suffix="ForImageClassification")
        except TaskError as error:
            raise self._error(str(error)) from error

    def _order(self, split: Split) -> npt.NDArray[np.int64]:
        """The fixed order that `limit` and `batches` count in: shuffled, for files may be sorted by label."""
        return np.random.default_rng(0).permutation(len(self._split(split)))

    def _split(self, split: Split) -> "Images":
        """A split's images, read once and decoded when they are needed."""
        if split not in self._images:
            if split not in self.settings.data:
                raise self._error(f"`data` names no {split} split: add one")
            from merging.tasks.vision.pictures import read_images  # with pandas, which takes a second

            paths = self.settings.data[split]
            try:
                self._images[split] = read_images(
                    [paths] if isinstance(paths, str) else paths,
                    self.settings.image,
                    self.settings.label,
                    self._classes,
                )
            except TaskError as error:
                raise self._error(f"{split}: {error}") from error
        return self._images[split]

    def _batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        pixels = torch.stack([self._pixels(split, int(place)) for place in places])
        labels = torch.from_numpy(self._split(split).labels[places])
        return Batch({"pixel_values": pixels}, labels, torch.from_numpy(places))

    def _pixels(self, split: Split, place: int) -> Tensor:
        """An image as the model reads it [channels, height, width], kept while there is room."""
        kept = self._prepared.get((split, place))
        if kept is not None:
            return kept
        from merging.tasks.vision.pictures import corrupt

        picture = self._split(split).decode(place)
        if self.settings.corruption is not None and split != "train":
            picture = corrupt(picture, self.settings.corruption, self.settings.severity, seed=place)
        pixels: Tensor = self._processor([picture], return_tensors="pt")["pixel_values"][0]
        if self._held + pixels.nbytes <= KEPT:
            self._prepared[split, place] = pixels
            self._held += pixels.nbytes
        return pixels

    def _error(self, message: str) -> TaskError:
        return TaskError(f"task '{self.name}': {message}")


register(ImageClassification, ImageClassificationSettings)
