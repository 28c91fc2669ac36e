import json
import shutil
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from merging.checkpoints.models.parameter_names import checkpoint_names
from merging.errors import TaskError
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticSettings, measure
from merging.tasks import ImageClassificationSettings, make_task
from merging.tasks.vision.pictures import CORRUPTIONS, corrupt

LABELS = {"id2label": {0: "dark", 1: "light", 2: "red"}, "label2id": {"dark": 0, "light": 1, "red": 2}}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "vit": (
            ViTForImageClassification,
            ViTConfig(**small, intermediate_size=24, image_size=24, patch_size=8, **LABELS),
        ),
        "dinov2": (
            Dinov2ForImageClassification,
            Dinov2Config(**small, mlp_ratio=2, image_size=24, patch_size=8, **LABELS),
        ),
        "convnext": (
            ConvNextForImageClassification,
            ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=4, **LABELS),
        ),
        "resnet": (
            ResNetForImageClassification,
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", **LABELS),
        ),
    }
    result = {}
    for name, (kind, config) in models.items():
        torch.manual_seed(2)
        path = tmp_path_factory.mktemp(name)
        kind(config).save_pretrained(path)
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
        result[name] = str(path)
    return result


def pictures(count, seed=0):
    g = np.random.default_rng(seed)
    labels = [("dark", "light", "red")[n % 3] for n in range(count)]
    centres = {"dark": (40, 40, 40), "light": (210, 210, 210), "red": (200, 40, 40)}
    arrays = [
        np.clip(np.array(centres[label]) + g.normal(0, 20, (*g.integers(20, 40, 2), 3)), 0, 255).astype(np.uint8)
        for label in labels
    ]
    return arrays, labels


def png(array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make(tmp_path, heads):
    def run(head="vit", count=11, rows=None, splits=("validation",), **settings):
        if rows is None:
            arrays, labels = pictures(count)
            rows = [
                {"image": {"bytes": png(a), "path": None}, "label": label}
                for a, label in zip(arrays, labels, strict=True)
            ]
        path = tmp_path / "images.parquet"
        pd.DataFrame(rows).to_parquet(path)
        return make_task(
            "colours", ImageClassificationSettings(data=dict.fromkeys(splits, str(path)), **settings), heads[head]
        )

    return run


@pytest.mark.parametrize("head", ["vit", "dinov2", "convnext", "resnet"])
def test_a_score_is_that_of_single_images(make, heads, head):
    task = make(head, batch_size=4)
    task.check()
    model = task.load_model()
    predictions = task.predict(model, "validation", np.arange(11))
    arrays, labels = pictures(11)
    order = np.random.default_rng(0).permutation(11)
    processor = task._processor
    for place, loss in zip(order, predictions.losses, strict=True):
        pixels = processor([arrays[place]], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            log_p = model(pixel_values=pixels).logits[0].double().log_softmax(-1)
        assert loss == pytest.approx(-float(log_p[LABELS["label2id"][labels[place]]]), abs=1e-5)
    some = task.predict(model, "validation", np.array([3, 0]))
    assert some.losses == pytest.approx(predictions.losses[[3, 0]], abs=1e-5)
    states = task.representation(model, next(task.batches("validation", 0, 2, 2)))
    assert states.dim() == 3
    assert len(states) == 2


def test_folders_of_classes_are_the_same_examples(make, heads, tmp_path):
    arrays, labels = pictures(6)
    for number, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        (tmp_path / "folder" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / label / f"{number}.png").write_bytes(png(array))
    folder = make_task("colours", ImageClassificationSettings(data={"test": str(tmp_path / "folder")}), heads["vit"])
    table = make(count=6, splits=("test",))
    model = table.load_model()
    assert folder.size("test") == 6
    for one, other in ((folder, table), (table, folder)):
        assert one.evaluate(model, "test").loss == pytest.approx(other.evaluate(model, "test").loss, abs=1e-6)


def test_statistics_see_images_and_need_labels_only_where_they_ask(make):
    task = make(splits=("train",))
    exact = STATISTICS["fisher"](LikelihoodSettings(estimator="exact", examples=6, batch_size=4))
    fisher = exact.finalize(measure(task, exact, "train"))
    model = task.load_model().double()
    names = checkpoint_names(model)
    expected = {}
    for batch in task.batches("train", 0, 6, 1):
        (logits,) = model(pixel_values=batch.inputs["pixel_values"].double()).logits
        log_p = logits.log_softmax(-1)
        for c in range(3):
            model.zero_grad()
            log_p[c].backward(retain_graph=True)
            for value in model.parameters():
                if value.grad is not None:
                    name = names[id(value)]
                    expected[name] = expected.get(name, 0) + log_p[c].exp().detach() * value.grad**2 / 6
    assert len(fisher) > 20
    for name, value in fisher.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-9)
    gram = STATISTICS["gram"](StatisticSettings(examples=6))
    assert len(gram.finalize(measure(task, gram, "train"))) > 4


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_corruptions_are_repeatable_and_grow(name):
    picture = pictures(1)[0][0]
    changed = [corrupt(picture, name, severity, seed=7) for severity in (1, 5)]
    assert all(other.shape == picture.shape and other.dtype == np.uint8 for other in changed)
    assert (corrupt(picture, name, 5, seed=7) == changed[1]).all()
    weak, strong = (np.abs(other.astype(float) - picture).mean() for other in changed)
    assert 0 < weak < strong


def test_a_corruption_changes_what_is_judged_but_not_what_statistics_see(make):
    plain, noisy = (
        make(splits=("train", "validation")),
        make(splits=("train", "validation"), corruption="gaussian_noise"),
    )
    model = plain.load_model()
    assert plain.evaluate(model, "validation").loss != noisy.evaluate(model, "validation").loss
    assert plain.data_fingerprint("validation") != noisy.data_fingerprint("validation")
    one, other = (next(task.batches("train", 0, 2, 2)).inputs["pixel_values"] for task in (plain, noisy))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"no image", "label": 0}, "images.parquet, row 2 is no image"),
        ({"image": b"", "label": 0}, "row 2: column 'image' holds no encoded image"),
        ({"image": png(pictures(1)[0][0])[:80], "label": 0}, "row 2 is no image"),
        ({"image": png(pictures(1)[0][0]), "label": 9}, "outside the head's 3 classes"),
    ],
)
def test_bad_images_are_named(make, row, message):
    good = {"image": png(pictures(1)[0][0]), "label": 0}
    with pytest.raises(TaskError, match=message):
        make(rows=[good, row]).check()


def test_a_head_without_processor_or_of_another_kind_is_refused(make, heads, tmp_path, head):
    with pytest.raises(TaskError, match="without a classification head"):
        make_task("colours", make().settings, head).check()
    config = tmp_path / "lonely"
    config.mkdir()
    for name in ("config.json", "model.safetensors"):
        (config / name).symlink_to(f"{heads['vit']}/{name}")
    with pytest.raises(TaskError, match="image processor .* cannot be loaded"):
        make_task("colours", make().settings, str(config)).check()


def encoded(array, kind="PNG"):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_images_that_a_processor_makes_different_of_are_refused(make, heads, tmp_path):
    shutil.copytree(heads["resnet"], tmp_path / "unsized")
    settings = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    (tmp_path / "unsized" / "preprocessor_config.json").write_text(json.dumps(settings))
    task = make()
    task.head = str(tmp_path / "unsized")
    with pytest.raises(TaskError, match="one shape is needed"):
        task.check()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (encoded(np.zeros((1, 500, 3), np.uint8)), "500 by 1 pixels"),
        (encoded(np.zeros((8, 8, 3), np.uint8), "PPM"), "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "no image that can be read"),
    ],
)
def test_images_that_are_none_or_too_long(make, content, why):
    rows = [{"image": content, "label": "dark"}, {"image": encoded(pictures(1)[0][0]), "label": "red"}]
    with pytest.raises(TaskError, match=why):
        make(rows=rows).check()


@pytest.mark.parametrize(
    ("head", "processor", "config"),
    [
        ("vit", {"size": {"height": 32, "width": 32}}, {}),
        ("convnext", {"size": {"height": 3, "width": 3}}, {}),
    ],
)
def test_a_processor_of_another_size_than_the_model_s_is_refused(make, heads, tmp_path, head, processor, config):
    place = tmp_path / "other"
    shutil.copytree(heads[head], place)
    settings = {"image_processor_type": "ViTImageProcessor"} | processor
    (place / "preprocessor_config.json").write_text(json.dumps(settings))
    task = make()
    task.head = str(place)
    with pytest.raises(TaskError, match=r"gives images of shape \[3, \d+, \d+\], which .* does not read"):
        task.check()


def test_images_of_other_channels_than_the_model_s_are_refused(make, tmp_path):
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=24,
        patch_size=8,
        num_channels=1,
        **LABELS,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "grey")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (tmp_path / "grey" / "preprocessor_config.json").write_text(json.dumps(settings))
    task = make()
    task.head = str(tmp_path / "grey")
    with pytest.raises(TaskError, match=r"images of shape \[3, 24, 24\], which .* does not read"):
        task.check()


def test_unlabelled_images_lie_in_a_folder_as_they_are(make, heads, tmp_path):
    arrays, _ = pictures(5)
    for number, array in enumerate(arrays):
        file = tmp_path / "pile" / ("holiday" if number > 2 else "") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(array))
    settings = ImageClassificationSettings(data={"train": str(tmp_path / "pile")}, label=None)
    task = make_task("colours", settings, heads["vit"])
    task.check()
    (batch,) = task.batches("train", 0, 9, 9)
    assert batch.labels.tolist() == [-100] * 5
    table = make(rows=[{"image": png(array)} for array in arrays], splits=("train",), label=None)
    gram = STATISTICS["gram"](StatisticSettings(examples=5))
    one, other = (gram.finalize(measure(each, gram, "train")) for each in (task, table))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)
