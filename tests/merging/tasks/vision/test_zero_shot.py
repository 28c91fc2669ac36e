"""Models of images and texts: scores are those of transformers' own zero-shot computation."""

import json
import shutil
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import BertTokenizerFast, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from merging.checkpoints.pool import Pool
from merging.errors import PoolError, TaskError
from merging.evaluation.live_models import LiveModels, check_models
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.recipe import Recipe
from merging.statistics import (
    Fisher,
    Gram,
    LikelihoodSettings,
    Representation,
    RepresentationSettings,
    StatisticSettings,
    measure,
)
from merging.tasks import ZeroShotSettings, make_task
from merging.testing.reference import brute_force

CLASSES = ["dark", "light", "red"]
TEMPLATE = "a {} film ."
KEPT = ["text_model.*", "text_projection.*", "logit_*"]
KINDS = {"clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig)}


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Writes a tiny model of images and texts, its vision tower moved by noise: `save(kind, seed)`."""
    words = tmp_path_factory.mktemp("words") / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", ".", *CLASSES]))
    tokenizer = BertTokenizerFast(str(words), model_max_length=12)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

    def write(kind, seed=0):
        model_type, config_type = KINDS[kind]
        text = {
            **small,
            "vocab_size": 11,
            "max_position_embeddings": 12,
            "eos_token_id": 3,
            "bos_token_id": 2,
            "pad_token_id": 0,
        }
        vision = {**small, "image_size": 24, "patch_size": 8}
        more = {"projection_dim": 12} if kind == "clip" else {}
        torch.manual_seed(3)
        model = model_type(config_type(text_config=text, vision_config=vision, **more))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.startswith("text"):
                    value.mul_(3)
                elif not name.startswith("logit"):
                    value.add_(torch.randn(value.shape, generator=generator) * (0.1 if seed == 0 else 0.03))
        path = tmp_path_factory.mktemp(f"{kind}{seed}")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
        return str(path)

    return write


@pytest.fixture(scope="module")
def pools(save):
    return {kind: {"base": save(kind), "one": save(kind, 1), "two": save(kind, 2)} for kind in KINDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    generator = np.random.default_rng(0)
    files = {}
    for split, count in (("train", 6), ("validation", 12), ("test", 9)):
        rows = []
        for number in range(count):
            buffer = BytesIO()
            Image.fromarray(generator.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
            rows.append({"image": buffer.getvalue(), "label": CLASSES[number % 3]})
        files[split] = str(tmp_path_factory.mktemp("images") / f"{split}.parquet")
        pd.DataFrame(rows).to_parquet(files[split])
    return files


@pytest.fixture
def make(pools, data):
    def run(kind, member="one", **settings):
        given = {"data": data, "labels": CLASSES, "template": TEMPLATE} | settings
        task = make_task("shades", ZeroShotSettings(**given), pools[kind][member])
        task.base = pools[kind]["base"]
        return task

    return run


def own_logits(task, model, split="validation"):
    """transformers' own: image by image, all prompts with each."""
    tokenizer = BertTokenizerFast.from_pretrained(task.base)
    long = {"padding": "max_length", "max_length": 12} if isinstance(model, SiglipModel) else {"padding": True}
    prompts = tokenizer([TEMPLATE.format(name) for name in CLASSES], return_tensors="pt", **long)
    rows = []
    with torch.no_grad():
        for place in range(task.size(split)):
            pixels = task._processor([task.split(split).decode(place)], return_tensors="pt")["pixel_values"]
            rows.append(model(**prompts, pixel_values=pixels).logits_per_image[0])
    return torch.stack(rows).double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_transformers_own(make, kind):
    task = make(kind)
    assert task.check() == []
    model = KINDS[kind][0].from_pretrained(task.head).eval()
    logits, labels = own_logits(task, model), torch.tensor(task.split("validation").labels)
    score = task.evaluate(task.load_model(), "validation")
    assert score.value == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert score.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert score.examples == 12
    assert not task.has_ensembles


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_image_tower_is_merged_and_the_export_has_the_base_s_text_tower(make, pools, kind, tmp_path):
    members = {name: path for name, path in pools[kind].items() if name != "base"}
    pool = Pool.open(pools[kind]["base"], members, KEPT)
    assert pool.weights
    assert not any(name.startswith(("text", "logit")) for name in pool.weights)
    task = make(kind)
    check_models(pool, [task], {"shades": "one"})
    recipe = Recipe("average", {"one": 1.0, "two": 1.0})
    live = LiveModels(Material(pool, {}, {}), [task], {"shades": "one"}, torch.device("cpu"))
    score = live.measure(recipe, "validation").scores["shades"]
    merge_to_disk(Material(pool, {}, {}), recipe, str(tmp_path / "merged"))
    exported = KINDS[kind][0].from_pretrained(tmp_path / "merged").eval()
    logits, labels = own_logits(task, exported), torch.tensor(task.split("validation").labels)
    assert score.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


def test_a_pool_that_merges_the_text_tower_is_refused(make, pools):
    pool = Pool.open(pools["clip"]["base"], {"one": pools["clip"]["one"]})
    with pytest.raises(
        PoolError, match=r"keep them out of the merge: `heads: \[logit_scale, text_model\.\*, text_projection\.\*\]`"
    ):
        check_models(pool, [make("clip")], {"shades": "one"})


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_of_the_image_tower(make, kind):
    task = make(kind)
    expected = brute_force(task)
    fisher = measure(task, Fisher(LikelihoodSettings(batch_size=4))).sums
    for name, value in expected.fisher.items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max() + 1e-6))
        assert bool(value.any()) or name.startswith(("text", "logit")) or name.endswith("k_proj.bias"), name
    grams = measure(task, Gram(StatisticSettings(batch_size=4)))
    spread = grams.sums | {name: grams.sums[holder] for name, holder in grams.shared.items()}
    assert spread.keys() == expected.gram.keys()
    for name, value in expected.gram.items():
        torch.testing.assert_close(spread[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    statistic = Representation(RepresentationSettings(pooling="mean"))
    assert statistic.finalize(measure(task, statistic))["representation"].shape == (6, 16)


def test_the_prompts_belong_to_the_data(make):
    plain = make("clip")
    assert make("clip").data_fingerprint("test") == plain.data_fingerprint("test")
    assert make("clip", template="a {} .").data_fingerprint("test") != plain.data_fingerprint("test")
    assert make("clip", labels=["light", "dark", "red"]).data_fingerprint("test") != plain.data_fingerprint("test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ["one"]}, "at least two"),
        ({"template": "a photo"}, "the same prompt"),
        ({"template": "{name}"}, "the same prompt"),
        ({"problem_type": "regression"}, "choose one of them"),
    ],
)
def test_settings_that_make_no_choice(settings, message):
    with pytest.raises(ValidationError, match=message):
        ZeroShotSettings(**{"data": {"test": "a.parquet"}, "labels": CLASSES, **settings})


def test_prompts_that_the_text_tower_cannot_read_are_refused(make):
    with pytest.raises(TaskError, match="longer than the 12 tokens that the text tower reads"):
        make("clip", template="a {} " + "film " * 20).check()


def test_a_checkpoint_without_a_text_tower_is_refused(make, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTForImageClassification(ViTConfig(**small, image_size=24, patch_size=8)).save_pretrained(tmp_path / "vit")
    task = make("clip")
    task.head = str(tmp_path / "vit")
    with pytest.raises(TaskError, match="cannot be loaded as AutoModelForZeroShotImageClassification"):
        task.check()


def test_a_processor_of_another_size_than_the_image_tower_s_is_refused(make, pools, tmp_path):
    shutil.copytree(pools["clip"]["one"], tmp_path / "other")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(processor))
    task = make("clip")
    task.head = str(tmp_path / "other")
    with pytest.raises(TaskError, match=r"images of shape \[3, 32, 32\], which CLIPModel does not read"):
        task.check()
