"""What every kind of task must do; each kind that gives predictions of single examples is tested here."""

import json
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

from merging.tasks import TASKS
from merging.testing.tasks import TaskTests

WORDS = "good bad great awful film book story plot very not really so".split()  # noqa: SIM905
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": len(VOCABULARY), "max_position_embeddings": 40}
IMAGE = {**SMALL, "image_size": 24, "patch_size": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
T5 = {"vocab_size": len(VOCABULARY), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
SIZES = {"train": 9, "validation": 11, "test": 10}
CLASSES = {"id2label": {0: "O", 1: "B-X", 2: "I-X"}, "label2id": {"O": 0, "B-X": 1, "I-X": 2}}
MANY = {"problem_type": "multi_label_classification", "num_labels": 3}


def sentence(generator):
    return [str(word) for word in generator.choice(WORDS, generator.integers(2, 12))]


def png(generator):
    buffer = BytesIO()
    Image.fromarray(generator.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def texts(label):
    return lambda g, number: {"text": " ".join(sentence(g)), "label": label(g, number)}


def tagged(g, number):
    words = sentence(g)
    return {"words": words, "tags": [int(tag) for tag in g.integers(0, 3, len(words))]}


def completed(g, number):
    return {"prompt": " ".join(sentence(g)), "completion": " ".join(sentence(g))}


def chosen(g, number):
    return {
        "prompt": " ".join(sentence(g)),
        "options": [" ".join(sentence(g)[:3]) for _ in range(3)],
        "label": number % 3,
    }


def pictured(g, number):
    return {"image": png(g), "label": number % 3}


BERT = "BertForSequenceClassification"
LLAMA = ("causal_lm", "LlamaForCausalLM", {**TEXT, **TOKENS})
PICTURES = {"labels": ["x", "y", "z"]}
CONVNEXT = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 4, **CLASSES}
TOWERS = {"text_config": {**TEXT, **TOKENS}, "vision_config": IMAGE, "projection_dim": 12}
classes, numbers = texts(lambda g, n: n % 3), texts(lambda g, n: g.normal(2, 3))
several = texts(lambda g, n: np.flatnonzero(g.random(3) < 0.5))
CASES = {
    "text classes": ("text_classification", BERT, {**TEXT, **CLASSES}, {}, classes),
    "text macro f1": ("text_classification", BERT, {**TEXT, **CLASSES}, {"metric": "macro_f1"}, classes),
    "text labels": ("text_classification", BERT, {**TEXT, **MANY}, {}, several),
    "text numbers": ("text_classification", BERT, {**TEXT, "num_labels": 1}, {}, numbers),
    "decoder classes": ("text_classification", "LlamaForSequenceClassification", {**LLAMA[2], **CLASSES}, {}, classes),
    "tags": ("token_classification", "BertForTokenClassification", {**TEXT, **CLASSES}, {}, tagged),
    "likelihood": (*LLAMA, {}, completed),
    "perplexity": (*LLAMA, {"metric": "neg_perplexity"}, completed),
    "choices": (*LLAMA, {"choices": "options"}, chosen),
    "generation": (*LLAMA, {"metric": "rouge_l", "max_new_tokens": 5}, completed),
    "seq2seq": (
        "seq2seq",
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0, "eos_token_id": 3},
        {"prompt": "prompt", "completion": "completion"},
        completed,
    ),
    "images": ("image_classification", "ViTForImageClassification", {**IMAGE, **CLASSES}, PICTURES, pictured),
    "convolutions": ("image_classification", "ConvNextForImageClassification", CONVNEXT, PICTURES, pictured),
    "zero shot": ("zero_shot_image_classification", "CLIPModel", TOWERS, {"labels": ["good", "bad", "film"]}, pictured),
}
SLOW = {"text macro f1", "decoder classes", "perplexity", "choices", "generation", "convolutions"}
"""Further metrics and architectures of kinds that are tested besides."""
PARTS = {
    "custom": "measured whole, or by values of a user's own",
    "lm_eval": "documents of harness tasks; tested in harness/",
}
"""Kinds that give no predictions of chosen examples from files of their own, and why they are not here."""
BROKEN = {
    "text_classification": ({"text": 7, "label": 0}, "column 'text' holds no text"),
    "token_classification": ({"words": ["good"], "tags": [9]}, "sentence .*: the tag 9 is none"),
    "causal_lm": ({"prompt": "good", "completion": ""}, "the completion '' has no token"),
    "choices": ({"prompt": "good", "label": 7}, "row 12: column 'label' holds 7: a position from 0 to 2"),
    "seq2seq": ({"prompt": "good", "completion": None}, "column 'completion' holds no text"),
    "image_classification": ({"image": b"no image", "label": 0}, r"row 12 is no image"),
    "zero_shot_image_classification": ({"image": b"no image", "label": 0}, r"row 12 is no image"),
}


def frame(kind, count, seed):
    generator = np.random.default_rng(seed)
    return pd.DataFrame([CASES[kind][-1](generator, number) for number in range(count)])


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Checkpoints by case, written when they are asked for."""
    made = {}
    words = tmp_path_factory.mktemp("words") / "vocab.txt"
    words.write_text("\n".join(VOCABULARY))
    tokenizer = transformers.BertTokenizerFast(str(words), model_max_length=40)

    def head(case):
        if case not in made:
            torch.manual_seed(0)
            model = getattr(transformers, CASES[case][1])
            live = model(model.config_class(**CASES[case][2]))
            with torch.no_grad():
                for name, value in live.named_parameters():
                    if not name.startswith("logit"):
                        value.add_(torch.randn_like(value) * 0.2)
            place = tmp_path_factory.mktemp(case.replace(" ", "_"))
            live.save_pretrained(place)
            tokenizer.save_pretrained(place)
            processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
            (place / "preprocessor_config.json").write_text(json.dumps(processor))
            made[case] = str(place)
        return made[case]

    return head


class TestEveryKind(TaskTests):
    """The suite, on every kind and some of their metrics."""

    @pytest.fixture(scope="class", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
    def kind(self, request):
        return request.param

    @pytest.fixture(scope="class")
    def data(self, kind, tmp_path_factory):
        place, files = tmp_path_factory.mktemp("data"), {}
        for seed, (split, count) in enumerate(SIZES.items()):
            files[split] = str(place / f"{split}.parquet")
            frame(kind, count, seed).to_parquet(files[split])
        return files

    @pytest.fixture
    def make_task(self, kind, data, heads):
        name, _, _, usual, _ = CASES[kind]
        task, settings = TASKS[name]

        def make(files=data, **changed):
            made = task("mine", settings(data=files, **usual, **changed), heads(kind))
            made.base = heads(kind)  # of an export the base stays where it is
            return made

        return make

    @pytest.fixture
    def broken(self, kind, data, make_task, tmp_path):
        row, message = BROKEN.get(kind) or BROKEN[CASES[kind][0]]
        good = pd.read_parquet(data["validation"])
        column = next(iter(row))
        file = tmp_path / "bad.parquet"
        if isinstance(row[column], str | int) and not isinstance(row[column], bytes):
            file = tmp_path / "bad.jsonl"
            rows = [*good.to_dict("records"), {**good.iloc[0].to_dict(), **row}]
            plain = lambda value: value.tolist() if hasattr(value, "tolist") else value  # noqa: E731
            file.write_text("\n".join(json.dumps({key: plain(value) for key, value in one.items()}) for one in rows))
        else:
            pd.concat([good, pd.DataFrame([{**good.iloc[0].to_dict(), **row}])]).to_parquet(file)
        nowhere = str(tmp_path / "nowhere.parquet")
        return [
            (lambda: make_task({**data, "validation": str(file)}), message),
            (lambda: make_task({**data, "test": nowhere}), "nowhere.parquet.*does not exist"),
        ]


def test_every_kind_is_tested():
    assert {case[0] for case in CASES.values()} | set(PARTS) == set(TASKS)
