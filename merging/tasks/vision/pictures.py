"""Images from Parquet files and folders: decoded, checked, and, where asked, corrupted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, UnidentifiedImageError

from merging.errors import TaskError
from merging.io import addresses, storage
from merging.tasks.labelled_texts import read_table
from merging.tasks.labels import label_columns, read_labels
from merging.tasks.likelihood import Likelihood
from merging.tasks.task import IGNORED

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded: other formats of the library start programs (EPS), or are no pictures."""
PIXELS = 1 << 26
"""Most pixels of an image: what claims more is a decompression bomb."""

Picture = npt.NDArray[np.uint8]
"""[height, width, 3]."""


@dataclass(frozen=True)
class Images:
    """A split's examples.

    Args:
        encoded: Each image's file, or where it lies [N].
        names: What each is called in messages [N].
        column: Of the images, for messages; empty where all are files.
        labels: Class indices [N]; of several labels or numbers [N, C].
    """

    encoded: Sequence[bytes | str]
    names: Sequence[str]
    labels: npt.NDArray[Any]
    column: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, place: int) -> Picture:
        """An image's pixels in RGB.

        Raises:
            TaskError: It does not decode.
        """
        content = self.encoded[place]
        try:
            raw = storage.read_bytes(content) if isinstance(content, str) else content
            with Image.open(BytesIO(raw), formats=FORMATS) as image:
                if image.width * image.height > PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels")
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # decoders of damaged files raise anything
            of_none = isinstance(error, UnidentifiedImageError)  # its own message shows an address in memory
            why = f"it is none of {', '.join(FORMATS)}" if of_none else str(error)[:300]
            where = f" (column '{self.column}')" if self.column and isinstance(content, bytes) else ""
            raise TaskError(f"{self.names[place]} is no image that can be read: {why}{where}") from error


def read_images(
    paths: Sequence[str],
    image: str,
    label: str | Sequence[str] | None,
    classes: Sequence[str],
    likelihood: Likelihood = "categorical",
) -> Images:
    """Reads a split: Parquet files with encoded images, or folders with one folder of images per class.

    Args:
        paths: Files or folders, local or at any fsspec address.
        image: Column of the images: bytes, or Hugging Face's Image feature (`bytes`, `path`).
        label: Column of the labels, or columns; None where there are none (−100, NaN): a folder's own images then count, and
            those of all folders in it.
        classes: The head's classes, in order.
        likelihood: What the head's logits are parameters of; a folder says one class an image.

    Raises:
        TaskError: A file, folder, column, image or label is missing or unusable.
    """
    parts = []
    for path in paths:
        is_folder = storage.is_dir(path)
        if is_folder and likelihood != "categorical" and label is not None:
            raise TaskError(
                f"{path}: folders of images say one class an image; the head wants more: use a Parquet file"
            )
        if is_folder and label is None:
            files = _unlabelled_files(path)
            none = (
                np.full(len(files), IGNORED)
                if likelihood == "categorical"
                else np.full((len(files), len(classes)), np.nan)
            )
            parts.append(Images(files, files, none))
        else:
            parts.append(_folder(path, classes) if is_folder else _table(path, image, label, classes, likelihood))
    encoded = [content for part in parts for content in part.encoded]
    if not encoded:
        raise TaskError(f"{', '.join(paths)}: there are no images")
    names = [name for part in parts for name in part.names]
    return Images(encoded, names, np.concatenate([part.labels for part in parts]), image)


def _table(
    path: str, image: str, label: str | Sequence[str] | None, classes: Sequence[str], likelihood: Likelihood
) -> Images:
    frame = read_table([path], [image, *label_columns(label)])
    encoded: list[bytes | str] = []
    for row, value in enumerate(frame[image], start=1):
        content = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(content, bytes) or not content:
            raise TaskError(f"{path}, row {row}: column '{image}' holds no encoded image: store the file's bytes")
        encoded.append(content)
    problems: list[str] = []
    labels = read_labels(frame, label, classes, likelihood, problems)
    if problems:
        raise TaskError(f"{path}: {'; '.join(problems)}")
    return Images(encoded, [f"{path}, row {row}" for row in range(1, len(encoded) + 1)], labels)


def _folder(path: str, classes: Sequence[str]) -> Images:
    folders = [name for name in storage.list_dir(path) if storage.is_dir(addresses.join(path, name))]
    if strange := [name for name in folders if name not in classes]:
        raise TaskError(f"{path}: folder '{strange[0]}' is none of the head's classes ({', '.join(classes)})")
    files, labels = [], []
    for name in sorted(folders):
        for file in sorted(storage.list_dir(addresses.join(path, name))):
            if file.lower().endswith(SUFFIXES):
                files.append(addresses.join(path, name, file))
                labels.append(list(classes).index(name))
    return Images(files, files, np.array(labels, np.int64))


def _unlabelled_files(path: str) -> list[str]:
    """A folder's images, and those of the folders in it, whatever these are called."""
    names = sorted(storage.list_dir(path))
    folders = [addresses.join(path, name) for name in names if storage.is_dir(addresses.join(path, name))]
    inner = [addresses.join(folder, name) for folder in folders for name in sorted(storage.list_dir(folder))]
    return [
        file for file in [*(addresses.join(path, name) for name in names), *inner] if file.lower().endswith(SUFFIXES)
    ]


def corrupt(picture: Picture, name: str, severity: int, seed: int) -> Picture:
    """A corrupted image of the same size, the same for the same seed.

    After ImageNet-C (Hendrycks and Dietterich 2019), whose seven kinds the selection paper tests on; written for images of
    any size, so that strengths scale with it and figures are not theirs.

    Args:
        picture: RGB [height, width, 3].
        name: One of `CORRUPTIONS`.
        severity: 1 … 5.
        seed: Of what is random.
    """
    changed = CORRUPTIONS[name](picture, severity, np.random.default_rng(seed))
    rounded: Picture = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return rounded


def _gaussian_noise(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    return x + 255 * (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * rng.standard_normal(x.shape)


def _impulse_noise(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw = rng.random(x.shape)
    return np.where(draw < share / 2, 0, np.where(draw < share, 255, x))


def _motion_blur(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """The mean along a line of a random direction."""
    length = max(3, round(max(x.shape[:2]) * (0.045, 0.067, 0.067, 0.09, 0.11)[severity - 1])) | 1
    angle, reach = rng.uniform(-np.pi / 4, np.pi / 4), length // 2
    padded = np.pad(x.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = np.zeros(x.shape)
    for step in range(-reach, reach + 1):
        down, right = reach + round(step * np.sin(angle)), reach + round(step * np.cos(angle))
        total += padded[down : down + x.shape[0], right : right + x.shape[1]]
    mean: npt.NDArray[Any] = total / length
    return mean


def _pixelate(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    share, (height, width) = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1], x.shape[:2]
    small = Image.fromarray(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def _spatter(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Drops of mud: smoothed noise above a threshold."""
    share = (0.04, 0.07, 0.11, 0.16, 0.22)[severity - 1]
    noise = Image.fromarray((255 * rng.random(x.shape[:2])).astype(np.uint8))
    smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(max(1.0, max(x.shape[:2]) / 60))), np.float64)
    drops = (smooth > np.quantile(smooth, 1 - share))[..., None]
    return np.where(drops, np.array([63.0, 42.0, 20.0]), x)


def _contrast(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    mean = x.mean(axis=(0, 1), keepdims=True)
    flat: npt.NDArray[Any] = (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean
    return flat


def _jpeg(x: Picture, severity: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    buffer = BytesIO()
    Image.fromarray(x).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(buffer).convert("RGB"))


CORRUPTIONS: Mapping[str, Callable[[Picture, int, np.random.Generator], npt.NDArray[Any]]] = {
    "motion_blur": _motion_blur,
    "impulse_noise": _impulse_noise,
    "gaussian_noise": _gaussian_noise,
    "pixelate": _pixelate,
    "spatter": _spatter,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
