import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score, log_loss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertModel, PreTrainedTokenizerFast

from merging.errors import TaskError
from merging.tasks import AnyTaskSettings, TextClassification, TextClassificationSettings, make_task


@pytest.fixture
def task(make_text_task, frames):
    return make_text_task(frames)


def edit_config(head, tmp_path, **changes):
    copy = tmp_path / "head"
    shutil.copytree(head, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return str(copy)


def slow_probabilities(model, tokenizer, texts):
    """One example at a time, without padding."""
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=32, return_tensors="pt") for text in texts]
        return torch.cat([model(**row).logits for row in rows]).double().softmax(1).numpy()


def test_evaluate_equals_one_by_one(task, frames, tokenizer):
    model = task.load_model()
    score = task.evaluate(model, "validation")
    labels = frames["validation"]["label"].to_numpy()
    expected = slow_probabilities(model, tokenizer, frames["validation"]["text"])
    assert score.value == pytest.approx((expected.argmax(1) == labels).mean())
    assert score.standard_error == pytest.approx(math.sqrt(score.value * (1 - score.value) / 50))
    assert score.loss == pytest.approx(log_loss(labels, expected, labels=[0, 1, 2]), abs=1e-6)
    assert score.expected_error == pytest.approx(1 - expected[np.arange(50), labels].mean(), abs=1e-6)
    assert (score.examples, score.metric) == (50, "accuracy")
    assert score.seconds > 0


def test_a_tokenizer_that_pads_on_the_left(make_text_task, frames, task, tmp_path):
    head = edit_config(task.head, tmp_path)
    file = Path(head) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    result = make_text_task(frames, head=head).evaluate(task.load_model(), "validation")
    assert result.loss == pytest.approx(task.evaluate(task.load_model(), "validation").loss, abs=1e-6)


def test_metric_setting(make_text_task, frames, tokenizer):
    task = make_text_task(frames, metric="macro_f1")
    model = task.load_model()
    score = task.evaluate(model, "test")
    predictions = slow_probabilities(model, tokenizer, frames["test"]["text"]).argmax(1)
    assert score.value == pytest.approx(f1_score(frames["test"]["label"], predictions, average="macro"))
    assert score.metric == "macro_f1"


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_batch_size_does_not_change_the_score(make_text_task, frames, task, batch_size):
    model = task.load_model()
    score = make_text_task(frames, batch_size=batch_size).evaluate(model, "validation")
    assert score.value == task.evaluate(model, "validation").value
    assert score.loss == pytest.approx(task.evaluate(model, "validation").loss, abs=1e-6)


def test_limit_takes_the_same_first_examples(task):
    model = task.load_model()
    assert task.evaluate(model, "validation", limit=20).examples == 20
    assert task.evaluate(model, "validation", limit=20).loss == task.evaluate(model, "validation", limit=20).loss
    assert task.evaluate(model, "validation", limit=10_000).loss == task.evaluate(model, "validation").loss
    (first,) = task.batches("validation", 0, 20, 20)
    logits = task.logits(model, first).detach()
    loss = torch.nn.functional.cross_entropy(logits, first.labels).item()
    assert task.evaluate(model, "validation", limit=20).loss == pytest.approx(loss, abs=1e-6)


def test_bfloat16_is_close_and_different(task):
    model = task.load_model()
    exact, rounded = (task.evaluate(model, "test", precision=name) for name in ("float32", "bfloat16"))
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.loss != exact.loss


def test_a_replaced_weight_changes_the_score(task):
    model = task.load_model()
    before = task.evaluate(model, "test").loss
    with torch.no_grad():
        model.classifier.bias.add_(torch.tensor([5.0, 0.0, 0.0]))
    assert task.evaluate(model, "test").loss != before


def test_nan_weights_name_the_task(task):
    model = task.load_model()
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(TaskError, match=r"task 'reviews': the model gave NaN or Inf for 50 of 50 validation examples"):
        task.evaluate(model, "validation")


def test_batches_cover_a_shuffled_split_once(task, frames):
    batches = list(task.batches("train", 0, 60, 16))
    indices = torch.cat([batch.indices for batch in batches])
    assert [len(batch.indices) for batch in batches] == [16, 16, 16, 12]
    assert sorted(indices.tolist()) == list(range(60))
    assert indices.tolist() != list(range(60))
    assert (
        torch.cat([batch.labels for batch in batches]).tolist() == frames["train"]["label"][indices.tolist()].tolist()
    )


def test_batches_do_not_depend_on_how_they_are_cut(task):
    model = task.load_model()
    whole = torch.cat([task.logits(model, batch) for batch in task.batches("train", 8, 40, 32)])
    parts = [batch for start in range(8, 40, 8) for batch in task.batches("train", start, start + 8, 5)]
    cut = torch.cat([task.logits(model, batch) for batch in parts])
    assert torch.allclose(whole, cut, atol=1e-5)
    assert len(next(task.batches("train", 55, 500, 16)).labels) == 5


def test_mask_and_representation(task, tiny_pool):
    model = task.load_model()
    (batch,) = task.batches("train", 0, 8, 8)
    states = task.representation(model, batch)
    assert states.shape == (*batch.inputs["input_ids"].shape, 32)
    assert batch.mask.dtype == torch.bool
    assert batch.mask.equal(batch.inputs["input_ids"] != 0)  # 0 is [PAD]
    backbone = BertModel.from_pretrained(tiny_pool["two"]).eval()
    assert torch.allclose(states, backbone(**batch.inputs).last_hidden_state, atol=1e-6)


def test_pairs_are_told_apart(make_text_task, frames):
    paired = {split: frame.assign(other=frame["text"].iloc[::-1].tolist()) for split, frame in frames.items()}
    task = make_text_task(paired, text_pair="other", max_length=16)
    (batch,) = task.batches("train", 0, 4, 4)
    assert task.check() is not None
    assert batch.inputs["token_type_ids"].max() == 1
    assert batch.inputs["input_ids"].shape[1] <= 16
    assert task.evaluate(task.load_model(), "test").examples == 40


def test_size(make_text_task, frames):
    task = make_text_task({split: frames[split] for split in ("train", "validation")})
    assert (task.size("train"), task.size("validation"), task.size("test")) == (60, 50, 0)
    with pytest.raises(TaskError, match="names no test split"):
        task.evaluate(task.load_model(), "test")


def test_fingerprint_follows_what_the_model_sees(make_text_task, frames, save_base, save_member, tiny_pool, tmp_path):
    original = make_text_task(frames).data_fingerprint("train")
    other_text = frames["train"].copy()
    other_text.loc[3, "text"] = "bad"
    other_label = frames["train"].copy()
    other_label.loc[3, "label"] = (other_label.loc[3, "label"] + 1) % 3
    tokens = json.loads((tiny_pool["two"] / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    other_head = tmp_path / "other_head"
    shutil.copytree(tiny_pool["two"], other_head)
    (other_head / "tokenizer.json").write_text(json.dumps(tokens))
    result = [
        make_text_task(frames | {"train": other_text}).data_fingerprint("train"),
        make_text_task(frames | {"train": other_label}).data_fingerprint("train"),
        make_text_task(frames, max_length=8).data_fingerprint("train"),
        make_text_task(frames, head=str(other_head)).data_fingerprint("train"),
        make_text_task(frames).data_fingerprint("test"),
        original,
    ]
    assert len(set(result)) == len(result)


def test_fingerprint_ignores_what_the_model_does_not_see(make_text_task, frames, tiny_pool):
    task = make_text_task(frames)
    original = task.data_fingerprint("train")
    task.evaluate(task.load_model(), "validation")
    assert task.data_fingerprint("train") == original  # tokenising leaves no trace
    reordered = frames | {"train": frames["train"].assign(unused=1)[["unused", "label", "text"]]}
    assert make_text_task(reordered).data_fingerprint("train") == original
    assert make_text_task(frames, batch_size=3, metric="macro_f1").data_fingerprint("train") == original
    assert make_text_task(frames, head=str(tiny_pool["three"])).data_fingerprint("train") == original


def test_task_travels(task):
    model = task.load_model()
    score = task.evaluate(model, "validation")
    again = pickle.loads(pickle.dumps(task))
    assert again.evaluate(model, "validation").loss == score.loss


def test_check_passes_with_notes(make_text_task, frames):
    assert make_text_task(frames, max_length=32).check() == []
    leaking = {
        "validation": frames["validation"],
        "train": pd.concat([frames["train"], frames["validation"][:4]]),
    }
    notes = "\n".join(make_text_task(leaking).check())
    assert "cut to 32 tokens" in notes
    assert "no test split" in notes
    assert "texts of validation also stand in train" in notes


def test_check_lists_all_that_is_wrong(make_text_task, frames):
    frames["train"]["label"] = 1
    frames["test"].loc[0, "label"] = 7
    task = make_text_task(frames)
    task.settings.data["validation"] = "nowhere.csv"
    with pytest.raises(TaskError) as error:
        task.check()
    lines = str(error.value).splitlines()
    assert lines[0] == "task 'reviews': 3 things to mend:"
    assert "train: " in lines[1]
    assert "all 60 examples have the label" in lines[1]
    assert "nowhere.csv: it does not exist" in lines[2]
    assert "7 (1 examples)" in lines[3]


def test_check_wants_a_validation_split(make_text_task, frames):
    with pytest.raises(TaskError, match="names no validation split"):
        make_text_task({"test": frames["test"]}).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertModel"]}, "is a BertModel, without a classification head"),
        ({"id2label": {"0": "LABEL_0"}}, "where its configuration wants"),
        ({"problem_type": "multi_label_classification"}, "a list is needed"),
        ({"problem_type": "regression"}, "a list is needed"),
        ({"id2label": {"0": "a", "1": "b"}}, r"labels outside the head's 2 classes"),
        ({"id2label": {"a": 0, "b": 1, "c": 2}}, r"`id2label` in the config.json of .* does not name classes 0, 1"),
        ({"id2label": ["a", "b", "c"]}, "does not name classes 0, 1"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "two classes of the same name"),
    ],
)
def test_check_looks_at_the_head(make_text_task, frames, head, tmp_path, changes, message):
    with pytest.raises(TaskError, match=message):
        make_text_task(frames, head=edit_config(head, tmp_path, **changes)).check()


def test_a_member_saved_without_its_tokenizer_takes_the_bases(make_text_task, frames, head, tiny_pool, tmp_path):
    """Of such a directory, transformers makes a tokenizer to which every word is unknown, and says nothing."""
    bare = Path(shutil.copytree(head, tmp_path / "bare"))
    for file in bare.glob("*token*"):
        file.unlink()
    task = make_text_task(frames, head=str(bare), max_length=32)
    with pytest.raises(TaskError, match=r"the tokenizer of .*bare cannot be loaded \(.*there is none\)"):
        task.check()
    task.base = str(tiny_pool["base"])
    assert any("has no tokenizer, and the base's is used" in note for note in task.check())
    assert task.data_fingerprint("test") == make_text_task(frames, max_length=32).data_fingerprint("test")


def test_a_tokenizer_that_knows_no_words_is_refused(make_text_task, frames, head, tmp_path):
    hollow = Path(shutil.copytree(head, tmp_path / "hollow"))
    (hollow / "tokenizer.json").unlink()
    with pytest.raises(TaskError, match=r"the tokenizer of .*hollow knows no words"):
        make_text_task(frames, head=str(hollow)).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"validation": []}}, "at least 1 item"),
        ({"text": "label"}, "each another one"),
        ({"text_pair": "text"}, "each another one"),
        ({"labels": ["a", "b", "a"]}, "two classes have the same name"),
    ],
)
def test_settings_that_contradict_themselves(settings, message):
    with pytest.raises(ValidationError, match=message):
        TextClassificationSettings(**({"data": {"validation": "a.csv"}} | settings))


def test_check_without_a_head(make_text_task, frames, tmp_path):
    with pytest.raises(TaskError, match=r"(?s)tokenizer of .*nowhere.*the head has no configuration"):
        make_text_task(frames, head=str(tmp_path / "nowhere")).check()


def test_labels_setting_names_the_classes(make_text_task, frames):
    names = ["negative", "neutral", "positive"]
    named = {split: frame.assign(label=[names[i] for i in frame["label"]]) for split, frame in frames.items()}
    by_name, by_number = make_text_task(named, labels=names), make_text_task(frames)
    model = by_number.load_model()
    named_score = by_name.evaluate(model, "validation")
    assert named_score.examples == 50
    with pytest.raises(TaskError, match=r"names 2 classes, .* has 3"):
        make_text_task(named, labels=names[:2]).check()


def test_load_model(task, head):
    model = task.load_model()
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.device.type for value in model.parameters()} == {"cpu"}


def test_check_finds_a_head_without_its_weights(make_text_task, frames, head, tmp_path):
    copy = edit_config(head, tmp_path)
    weights = load_file(f"{head}/model.safetensors")
    save_file({name: value for name, value in weights.items() if "classifier" not in name}, f"{copy}/model.safetensors")
    with pytest.raises(TaskError, match="lacks the weights of 'classifier', the head of BertForSequenceClassification"):
        make_text_task(frames, head=copy).check()


def test_load_model_refuses_an_untrained_head(make_text_task, frames, tiny_pool):
    with pytest.raises(TaskError, match=r"lacks 2 weights .*classifier\.bias, classifier\.weight"):
        make_text_task(frames, head=str(tiny_pool["base"])).load_model()


def test_load_model_refuses_a_pickle(make_text_task, frames, head, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(head, copy)
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(TaskError, match="cannot be loaded as AutoModelForSequenceClassification"):
        make_text_task(frames, head=str(copy)).load_model()


def test_head_at_an_address(make_text_task, frames, head, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{head}/", "/heads/two/", recursive=True)
    task, local = make_text_task(frames, head="memory://heads/two"), make_text_task(frames)
    assert task.evaluate(task.load_model(), "test").loss == local.evaluate(local.load_model(), "test").loss


def test_loading_is_silent(task, capfd):
    task.load_model()
    task.check()
    out, err = capfd.readouterr()
    assert out + err == ""


def test_settings_are_one_of_the_kinds():
    adapter = TypeAdapter(AnyTaskSettings)
    text = adapter.validate_python({"kind": "text_classification", "data": {"validation": "a.csv"}})
    assert isinstance(text, TextClassificationSettings)
    assert adapter.validate_python({"data": {"validation": "a.csv"}}) == text
    assert isinstance(make_task("t", text, "head"), TextClassification)
    for wrong in (
        {"kind": "images"},
        {"kind": "text_classification", "data": {}},
        {"kind": "text_classification", "data": {"dev": "a.csv"}},
        {"kind": "text_classification", "data": {"validation": "a.csv"}, "colour": "red"},
        {"kind": "text_classification", "data": {"validation": "a.csv"}, "batch_size": 0},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    with pytest.raises(ValidationError, match="Did you mean 'accuracy'"):
        TextClassificationSettings(data={"test": "a.csv"}, metric="acuracy")


def test_a_text_without_tokens_is_named(make_text_task, frames, head, tokenizer, tmp_path):
    place = tmp_path / "bare"
    shutil.copytree(head, place)
    fast = tokenizer.backend_tokenizer
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(fast.get_vocab(), unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    bare.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    bare.save_pretrained(place)
    frames["test"].loc[3, "text"] = "  "
    task = make_text_task(frames, str(place))
    with pytest.raises(TaskError, match=r"test\.parquet, row 4: column 'text' holds no token"):
        task.check()
    make_text_task(frames).check()  # of a tokenizer that adds tokens it is a text as others
