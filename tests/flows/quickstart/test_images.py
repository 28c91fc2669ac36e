import gzip
import io
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model

from flows.quickstart.images import CLOTHES, FOLDERS, SIDE, clip_art, clothes, digits, frames, save_vit
from merging.errors import StorageError
from merging.tasks.head import load_image_processor

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 28,
    "patch_size": 14,
}


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_digits():
    rows = np.zeros((2, 785), int)
    rows[0, 30], rows[:, -1] = 200, (7, 0)
    raw = gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())
    (seven, _), (_, zero) = digits(raw)
    assert pixels(seven)[1, 2] == 200
    assert (digits(raw)[0][1], zero) == ("7", "0")


def test_clothes():
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    result = clothes(gzip.compress(b"\0" * 16 + images.tobytes()), gzip.compress(b"\0" * 8 + bytes([9, 0, 3, 3, 1])))
    expected = {images[i].tobytes(): CLOTHES[label] for i, label in enumerate([9, 0, 3, 3, 1])}
    assert {pixels(image).tobytes(): label for image, label in result} == expected


def test_clip_art_is_put_on_white_once(tmp_path):
    root = tmp_path / "root"
    folder = root / FOLDERS / "shapes" / "stars" / "inner"
    folder.mkdir(parents=True)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    for name in ("one", "same"):
        Image.new("RGBA", (300, 150), (255, 0, 0, 255)).save(folder / f"{name}.png")
    package = tmp_path / "a.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(package)], check=True, capture_output=True)
    ((content, label),) = clip_art(package, {"star": ("shapes/stars",), "arrow": ("shapes/arrows",)})
    image = pixels(content)
    assert (label, image.shape) == ("star", (SIDE, SIDE, 3))
    assert image[SIDE // 2, SIDE // 2].tolist() == [255, 0, 0]
    assert image[0, 0].tolist() == [255, 255, 255]


def test_frames_share_no_image():
    pictures = [(bytes([i % 30]), str(i % 30 % 3)) for i in range(60)]
    parts = frames(pictures, {"train": 15, "validation": 5, "test": 10})
    assert [len(part) for part in parts.values()] == [15, 5, 10]
    assert pd.concat(parts.values())["image"].is_unique


def test_vit_from_its_parameters(tmp_path):
    """Weights under DINOv2's older names give the same model as transformers' own."""
    torch.manual_seed(0)
    reference = Dinov2Model(Dinov2Config(**CONFIG)).eval()
    reference.save_pretrained(tmp_path / "reference")
    from safetensors.torch import load_file

    values = {name: value.numpy() for name, value in load_file(tmp_path / "reference/model.safetensors").items()}
    save_vit(values, CONFIG, tmp_path / "made")
    image = torch.rand(1, 3, 42, 42)
    model = AutoModel.from_pretrained(tmp_path / "made").eval()
    with torch.inference_mode():
        assert model(image).last_hidden_state.equal(reference(image).last_hidden_state)
    processed = load_image_processor(str(tmp_path / "made"))([np.zeros((50, 20, 3), np.uint8)], return_tensors="pt")
    assert processed["pixel_values"].shape == (1, 3, 98, 98)


def test_vit_that_lacks_a_parameter(tmp_path: Path):
    with pytest.raises(StorageError, match="the converted vision transformer lacks"):
        save_vit({"layernorm.weight": np.ones(16)}, CONFIG, tmp_path / "made")
    assert not (tmp_path / "made").exists()
