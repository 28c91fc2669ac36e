"""What all tasks on files have in common: limits of tokenizer and model, splits read once, in one fixed order."""

import json
import shutil

import numpy as np
import pytest
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast, GPT2Config, GPT2LMHeadModel

from merging.errors import TaskError
from merging.tasks import CausalLMSettings, TextClassificationSettings, TokenClassificationSettings, make_task
from merging.tasks.file_task import longest_first

WORDS = "good bad film book".split()  # noqa: SIM905
KINDS = ("text_classification", "token_classification", "causal_lm")


@pytest.fixture(scope="module")
def heads(tmp_path_factory, tiny_pool):
    """A head of each kind that a tokenizer reads for; none has more than 16 positions but the first."""
    place = tmp_path_factory.mktemp("heads")
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(place / "vocab.txt"), model_max_length=1000)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tagger = BertForTokenClassification(BertConfig(vocab_size=9, max_position_embeddings=16, num_labels=2, **small))
    writer = GPT2LMHeadModel(
        GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=2, eos_token_id=3)
    )
    for name, model in (("token_classification", tagger), ("causal_lm", writer)):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    shutil.copytree(tiny_pool["two"], place / "text_classification")
    return place


@pytest.fixture
def make(tmp_path, heads):
    """A task of a kind on long examples, its head's tokenizer configuration changed: `make(kind, **changes)`."""

    def run(kind, **changes):
        head = tmp_path / kind
        shutil.copytree(heads / kind, head)
        file = head / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        words = [WORDS[n % 4] for n in range(40)]
        rows = {
            "text_classification": [{"text": " ".join(words), "label": n} for n in range(3)],
            "token_classification": [{"words": words, "tags": [n % 2 for n in range(40)]}],
            "causal_lm": [{"prompt": " ".join(words), "completion": "good"}],
        }
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows[kind])))
        settings = {
            "text_classification": TextClassificationSettings,
            "token_classification": TokenClassificationSettings,
            "causal_lm": CausalLMSettings,
        }[kind]
        return make_task("x", settings(data={"validation": str(data)}, max_length=500), str(head))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_cut_to_what_the_model_has_positions_for(make, kind):
    task = make(kind, model_max_length=10**30)
    task.check()
    limit = 32 if kind == "text_classification" else 16
    assert task.max_length == limit
    (batch,) = task.batches("validation", 0, 1, 1)
    assert batch.inputs["input_ids"].shape[1] <= limit
    assert task.evaluate(task.load_model(), "validation").examples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [-1, 0, "many", [512]])
def test_a_tokenizer_without_a_usable_limit_is_refused(make, kind, limit):
    with pytest.raises(TaskError, match="model_max_length|tokenizer of .* cannot be loaded"):
        make(kind, model_max_length=limit).check()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_beyond_the_embedding_are_refused(make, kind):
    added = {str(number): {"content": f"<new{number}>", "special": False} for number in range(90, 93)}
    with pytest.raises(TaskError, match="tokens that the model has no embedding for"):
        make(kind, added_tokens_decoder=added).check()


def test_a_split_is_read_once_in_one_fixed_order(make):
    task = make("text_classification")
    first = task.split("validation")
    assert task.split("validation") is first
    assert sorted(task.order("validation")) == [0, 1, 2]
    assert (task.order("validation") == np.random.default_rng(0).permutation(3)).all()
    with pytest.raises(TaskError, match="names no test split"):
        task.split("test")
    assert task.missing_splits() == [
        "task 'x' has no train split: no statistics can be computed for it",
        "task 'x' has no test split: its winner is known on validation only",
    ]


def test_the_longest_come_first_and_equals_stay_in_order():
    assert longest_first([2, 5, 5, 1, 9], 2) == [[4, 1], [2, 0], [3]]
