"""Images in classes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.errors import TaskError
from merging.io import hashing, storage
from merging.io.addresses import in_words
from merging.tasks.classification import Classifier, ClassifierSettings, batch_labels, labels_where_judged
from merging.tasks.head import IMAGE_PROCESSOR, load_image_processor
from merging.tasks.metrics import Labels
from merging.tasks.task import Batch, Split, register

if TYPE_CHECKING:
    from merging.tasks.vision.pictures import Images

MAX_ASPECT = 100
"""Length of an image by its width: a processor that resizes the shorter side would make too much of more."""
KEPT = 1 << 30
"""Bytes of prepared images of a task that stay in memory from candidate to candidate."""

Corruption = Literal["motion_blur", "impulse_noise", "gaussian_noise", "pixelate", "spatter", "contrast", "jpeg"]


class ImageClassificationSettings(ClassifierSettings):
    """Images in classes, from Parquet files with encoded images or from folders with a folder for each class."""

    kind: Literal["image_classification"] = Field("image_classification", description="image_classification.")
    data: dict[Split, str | Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1,
        description="Split (train, validation, test) → Parquet file, folder of class folders, or a list of these.",
    )
    image: str = Field("image", description="Column of the encoded image: bytes, or Hugging Face's Image feature.")
    corruption: Corruption | None = Field(
        None, description="Corrupt validation and test images, for a table of robustness beside the task itself."
    )
    severity: int = Field(3, ge=1, le=5, description="Of the corruption.")
    batch_size: int = Field(32, ge=1, description="Images per step of evaluation; does not change the score.")

    _labels_where_judged = model_validator(mode="after")(labels_where_judged)


class ImageClassification(Classifier["Images"]):
    """An image classification task; see `Task`."""

    kind: ClassVar[str] = "image_classification"
    model_class: ClassVar[str] = "AutoModelForImageClassification"

    def __init__(self, name: str, settings: ImageClassificationSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: ImageClassificationSettings = settings
        self._prepared: dict[tuple[Split, int], Tensor] = {}
        self._held = 0

    def check(self) -> list[str]:
        """Reads and decodes all splits, the head's classes and its processor; see `Task.check`."""
        _ = self.metric
        super().blank_model()
        extents: dict[tuple[int, ...], tuple[Split, int]] = {}
        for split in self.settings.data:
            images = self.split(split)
            for place in range(len(images)):
                try:
                    extents.setdefault(images.decode(place).shape, (split, place))
                except TaskError as error:
                    raise self.error(f"{split}: {error}") from error
        self._check_processor(extents)
        self._check_model_reads()
        return self.missing_splits()

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
                raise self.error(
                    f"{split}: {self.split(split).names[place]} is {longest} by {shortest} pixels, longer than "
                    f"{MAX_ASPECT} times its width: crop it"
                )
            try:
                shapes.add(tuple(self._pixels(split, place).shape))
            except TaskError:
                raise
            except Exception as error:  # a processor's own
                raise self.error(
                    f"the processor of {self.head} cannot prepare {self.split(split).names[place]}: {str(error)[:300]}"
                ) from error
        if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
            raise self.error(
                f"the processor of {self.head} gives images of shapes {sorted(map(list, shapes))}: one shape is needed, "
                "[channels, height, width]. Let it resize or crop"
            )

    def _check_model_reads(self) -> None:
        """Whether the model takes pixels of the shape that its processor gives.

        Raises:
            TaskError: It wants another size, or other channels.
        """
        shape = self.pixel_shape
        try:
            self.run(super().blank_model()[0].eval(), torch.empty(1, *shape, device="meta"))
        except Exception:  # of a wrong size, or because this model runs with values alone
            model = self.load_model()
            try:
                self.run(model, torch.zeros(1, *shape))
            except Exception as error:  # each architecture's own
                raise self.error(
                    f"the processor of {self.head} gives images of shape {list(shape)}, which {type(model).__name__} does not "
                    f"read ({in_words(error)}): set size and channels in {IMAGE_PROCESSOR} to the model's"
                ) from error

    @cached_property
    def pixel_shape(self) -> tuple[int, ...]:
        """[channels, height, width] of an image as the model reads it."""
        split = next(iter(self.settings.data))
        return tuple(self._pixels(split, 0).shape)

    def run(self, model: nn.Module, pixels: Tensor) -> None:
        """Runs what images pass through."""
        with torch.no_grad():
            model(pixel_values=pixels)

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of images, labels, corruption and the processor's settings."""
        images = self.split(split)
        digest = hashlib.sha256()
        for content in images.encoded:
            digest.update(storage.read_bytes(content) if isinstance(content, str) else content)
        settings = self.settings.model_dump(mode="json", include={"corruption", "severity"}) | {"metric": self.metric}
        labels = images.labels.tolist() if np.isfinite(images.labels).all() else None
        others = [] if self.outputs == "categorical" else [self.outputs, self.spread]
        return hashing.fingerprint([digest.hexdigest(), labels, settings, self._processor.to_json_string(), *others])

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The backbone's last hidden states [N, S, D]; of a convolutional one, its last feature map, place by place."""
        states = super().representation(model, batch)
        return states if states.dim() == 3 else states.flatten(2).transpose(1, 2)

    @cached_property
    def _processor(self) -> Any:
        return load_image_processor(self.head, self.base)

    def read(self, paths: Sequence[str]) -> "Images":
        """See `FileTask.read`; images are decoded when they are needed."""
        from merging.tasks.vision.pictures import read_images  # with pandas, which takes a second

        return read_images(paths, self.settings.image, self.settings.label, self.classes, self.outputs)

    def labels_of(self, split: Split) -> Labels:
        """See `Classifier.labels_of`."""
        return self.split(split).labels

    def make_batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """See `FileTask.make_batch`; every position counts."""
        pixels = torch.stack([self._pixels(split, int(place)) for place in places])
        labels = batch_labels(self.labels_of(split)[places])
        return Batch({"pixel_values": pixels}, labels, torch.from_numpy(places))

    def evaluation_batches(
        self, split: Split, places: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Batch, npt.NDArray[np.int64]]]:
        """See `Classifier.evaluation_batches`."""
        size = self.settings.batch_size
        for first in range(0, len(places), size):
            part = places[first : first + size]
            yield self.make_batch(split, part), np.arange(first, first + len(part))

    def _pixels(self, split: Split, place: int) -> Tensor:
        """An image as the model reads it [channels, height, width], kept while there is room."""
        kept = self._prepared.get((split, place))
        if kept is not None:
            return kept
        from merging.tasks.vision.pictures import corrupt

        picture = self.split(split).decode(place)
        if self.settings.corruption is not None and split != "train":
            picture = corrupt(picture, self.settings.corruption, self.settings.severity, seed=place)
        pixels: Tensor = self._processor([picture], return_tensors="pt")["pixel_values"][0]
        if self._held + pixels.nbytes <= KEPT:
            self._prepared[split, place] = pixels
            self._held += pixels.nbytes
        return pixels


register(ImageClassification, ImageClassificationSettings)
