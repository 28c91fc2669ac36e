import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from merging.errors import TaskError
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticSettings, measure
from merging.statistics.capture import per_sample_grads
from merging.tasks import CausalLMSettings, make_task

WORDS = "the cat dog sat ran on a mat hill big small red and then home 1 2 3 4 :".split()  # noqa: SIM905
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="module")
def words():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<user>": 4, "<assistant>": 5}
    vocabulary |= {word: len(vocabulary) + place for place, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )


@pytest.fixture(scope="module")
def heads(words, tmp_path_factory):
    size = len(words.get_vocab())
    configs = {
        "llama": LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        "gpt2": GPT2Config(
            vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=2
        ),
        "short window": MistralConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
            max_position_embeddings=64,
        ),
        "looks ahead": BertConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
        "without keys": MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=2, state_size=4),
    }
    result = {}
    for name, config in configs.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for value in model.parameters():
            value.data += 0.3 * torch.randn_like(value)
        result[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(result[name])
        words.save_pretrained(result[name])
    return result


@pytest.fixture
def make(tmp_path, heads):
    def run(rows, head="llama", splits=("validation",), **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return make_task("lm", CausalLMSettings(data=dict.fromkeys(splits, str(path)), **settings), heads[head])

    return run


def random_rows(count=7, seed=0):
    g = np.random.default_rng(seed)
    text = lambda low, high: " ".join(g.choice(WORDS, g.integers(low, high)))  # noqa: E731
    return [{"prompt": text(1, 9), "completion": text(1, 5)} for _ in range(count)]


def brute(model, words, prompt, completion):
    """Log-probabilities of a completion's tokens, one example at a time, without padding."""
    before, after = words(prompt)["input_ids"], words(completion)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([(before + after)[:-1]])).logits[0].double().log_softmax(-1)
    return [float(log_p[len(before) + place - 1, token]) for place, token in enumerate(after)]


@pytest.mark.parametrize("head", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_are_those_of_single_examples_without_padding(make, words, head, batch_size):
    rows = random_rows()
    task = make(rows, head, batch_size=batch_size)
    assert task.check()
    model = task.load_model()
    predictions = task.predict(model, "validation", np.arange(len(rows)))
    order = np.random.default_rng(0).permutation(len(rows))
    expected = [np.mean(brute(model, words, rows[i]["prompt"], rows[i]["completion"])) for i in order]
    assert predictions.values == pytest.approx(expected, abs=1e-5)
    assert predictions.losses == pytest.approx([-value for value in expected], abs=1e-5)
    assert predictions.surrogates == pytest.approx(np.exp(expected), abs=1e-5)
    some = task.predict(model, "validation", np.array([4, 1]))
    assert some.values == pytest.approx(predictions.values[[4, 1]], abs=1e-6)
    assert task.score(predictions).is_mean


def test_perplexity_is_of_all_tokens_together(make, words):
    rows = random_rows()
    task = make(rows, metric="neg_perplexity")
    model = task.load_model()
    each = [brute(model, words, row["prompt"], row["completion"]) for row in rows]
    score = task.evaluate(model, "validation")
    assert -score.value == pytest.approx(np.exp(-np.mean(np.concatenate(each))), rel=1e-5)
    assert score.standard_error > 0
    assert not score.is_mean


def test_a_plain_text_is_predicted_whole_from_the_end_of_text_token(make, words):
    task = make([{"text": "the cat sat"}, {"text": "a red dog ran home"}], text="text")
    model = task.load_model()
    predictions = task.predict(model, "validation", np.arange(2))
    order = np.random.default_rng(0).permutation(2)
    texts = ["the cat sat", "a red dog ran home"]
    expected = [np.mean(brute(model, words, "</s>", texts[i])) for i in order]
    assert predictions.values == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_norm", "accuracy_unconditional"])
@pytest.mark.parametrize("by_text", [False, True])
def test_the_likeliest_choice_is_the_answer(make, words, metric, by_text):
    g = np.random.default_rng(5)
    rows = []
    for _ in range(9):
        choices = [" ".join(g.choice(WORDS, g.integers(1, 4), replace=False)) for _ in range(3)]
        label = int(g.integers(3))
        rows.append({"prompt": "the cat", "options": choices, "label": choices[label] if by_text else label})
    task = make(rows, choices="options", metric=metric)
    model = task.load_model()
    predictions = task.predict(model, "validation", np.arange(9))
    for value, surrogate, row in zip(
        predictions.values,
        predictions.surrogates,
        [rows[i] for i in np.random.default_rng(0).permutation(9)],
        strict=True,
    ):
        sums = np.array([sum(brute(model, words, row["prompt"], choice)) for choice in row["options"]])
        if metric == "accuracy_norm":
            sums = sums / [len(choice) for choice in row["options"]]
        if metric == "accuracy_unconditional":
            sums = sums - [sum(brute(model, words, "</s>", choice)) for choice in row["options"]]
        right = row["options"].index(row["label"]) if by_text else row["label"]
        chances = np.exp(sums - sums.max()) / np.exp(sums - sums.max()).sum()
        assert value == float(sums.argmax() == right)
        assert surrogate == pytest.approx(chances[right], abs=1e-4)


@pytest.mark.parametrize("head", ["llama", "gpt2", "short window", "looks ahead", "without keys"])
@pytest.mark.parametrize("most", [1, 4])
def test_prompts_are_read_once_only_where_that_changes_nothing(make, words, head, most):
    g = np.random.default_rng(2)
    rows = [
        {
            "prompt": " ".join(g.choice(WORDS, g.integers(1, 12))),
            "options": [" ".join(g.choice(WORDS, g.integers(1, most + 1))) for _ in range(g.integers(2, 5))],
            "label": 0,
        }
        for _ in range(9)
    ]
    task = make(rows, head, choices="options", batch_size=5)
    model = task.load_model()
    chances = []
    for row in (rows[i] for i in np.random.default_rng(0).permutation(9)):
        sums = torch.tensor([sum(brute(model, words, row["prompt"], choice)) for choice in row["options"]])
        chances.append(float(sums.softmax(0)[0]))
    predictions = task.predict(model, "validation", np.arange(9))
    assert predictions.surrogates == pytest.approx(chances, abs=1e-4)
    shared = {"one token": True}  # nothing but the prompt is read either way
    if most > 1:
        shared["several tokens"] = head in ("llama", "gpt2", "short window")
    assert task._shared == shared


def test_generation_is_greedy_and_graded(make, words):
    rows = random_rows()
    task = make(rows, metric="exact_match", max_new_tokens=3, batch_size=3)
    model = task.load_model()
    assert task.evaluate(model, "validation").value < 0.5
    own = []
    for row in rows:
        ids = words(row["prompt"], return_tensors="pt")["input_ids"]
        for _ in range(3):
            with torch.no_grad():
                token = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], 1)
            if token == words.eos_token_id:
                break
        own.append(words.decode(ids[0, words(row["prompt"], return_tensors="pt")["input_ids"].shape[1] :], True))
    reported = [{**row, "completion": answer or "home"} for row, answer in zip(rows, own, strict=True)]
    assert (
        make(reported, metric="exact_match", max_new_tokens=3, batch_size=3).evaluate(model, "validation").value > 0.8
    )
    assert make(reported, metric="contains", max_new_tokens=3).evaluate(model, "validation").value > 0.8


@pytest.mark.parametrize("at_once", [None, 600])
def test_statistics_see_completions_only(make, heads, words, monkeypatch, caplog, at_once):
    """The empirical Fisher is the mean of squared gradients of single examples' summed log-likelihood."""
    if at_once is not None:  # rows of the embedding that are computed together: 9 of 25
        monkeypatch.setitem(per_sample_grads.BLOCK_BYTES, "cpu", at_once)
    caplog.set_level("DEBUG")
    rows = random_rows(5)
    task = make(rows, splits=("train",))
    statistic = STATISTICS["fisher"](LikelihoodSettings(estimator="empirical", examples=5, batch_size=2))
    fisher = statistic.finalize(measure(task, statistic, "train"))
    model = task.load_model().double()
    expected = {}
    for row in rows:
        model.zero_grad()
        before, after = words(row["prompt"])["input_ids"], words(row["completion"])["input_ids"]
        log_p = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        sum(log_p[len(before) + place - 1, token] for place, token in enumerate(after)).backward()
        for name, value in model.named_parameters():
            expected[name] = expected.get(name, 0) + value.grad**2 / len(rows)
    assert fisher.keys() <= expected.keys()
    assert {"model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"} <= fisher.keys()
    assert "run alone" not in caplog.text
    for name, value in fisher.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-7)
    gram = STATISTICS["gram"](StatisticSettings(examples=5, batch_size=2))
    one = gram.finalize(measure(task, gram, "train"))
    other = STATISTICS["gram"](StatisticSettings(examples=5, batch_size=5))
    two = other.finalize(measure(task, other, "train"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6)


def test_members_complete_prompts_themselves(make, words):
    rows = [{"prompt": row["prompt"]} for row in random_rows(4)]
    task = make(rows, splits=("train",), completion=None, max_new_tokens=4)
    (batch,) = task.batches("train", 0, 4, 4)
    assert batch.labels.shape[0] == 4
    assert (batch.labels != -100).any(1).all()
    with pytest.raises(ValueError, match="nothing is judged without completions"):
        make(rows, completion=None)


def test_a_chat_template_is_put_around_both(make, words):
    task = make(random_rows(2), chat=True)
    (batch,) = task.batches("validation", 0, 1, 1)
    ids = batch.inputs["input_ids"][0].tolist()
    assert ids[0] == words.convert_tokens_to_ids("<user>")
    assert words.convert_tokens_to_ids("<assistant>") in ids


def test_templates_see_columns(make, words):
    rows = [{"a": "cat", "b": "dog", "completion": "sat"}]
    task = make(rows, template="the {{ a }} and {{ b }}")
    (batch,) = task.batches("validation", 0, 1, 1)
    assert words.decode(batch.inputs["input_ids"][0]) == "the cat and dog"
    assert words.decode(batch.labels[0]) == "sat"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "a", "completion": ""}], {}, "row 1: the completion '' has no token"),
        ([{"prompt": "a", "completion": 3}], {}, "column 'completion' holds no text in 1 of 1 rows"),
        ([{"prompt": "a"}], {}, "has no column 'completion'"),
        ([{"prompt": "a", "completion": "the " * 9}], {"max_length": 4}, "`max_length` is 4: raise it"),
        ([{"prompt": "a", "c": ["x"], "label": 0}], {"choices": "c"}, "row 1: column 'c' holds .* at least two"),
        ([{"prompt": "a", "c": ["x", "y"], "label": 2}], {"choices": "c"}, "a position from 0 to 1"),
        ([{"prompt": "a", "c": ["x", "y"], "label": "z"}], {"choices": "c"}, "none of the choices"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{{ nothing }}"}, "has no column 'nothing'"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{{ prompt"}, "`template`"),
    ],
)
def test_bad_data_is_refused_by_row(make, rows, settings, message):
    with pytest.raises(TaskError, match=message):
        make(rows, **settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "accuracy"}, "needs `choices`"),
        ({"metric": "exact_mach"}, "1 validation error(.|\n)*unknown metric 'exact_mach'. Did you mean 'exact_match'?"),
        ({"choices": "c", "metric": "exact_match"}, "does not go with `choices`"),
        ({"text": "t", "metric": "contains"}, "no reference"),
        ({"extract": "(", "metric": "contains"}, "no regular expression"),
        ({"extract": "x"}, "`extract` goes with"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLMSettings(data={"validation": "x.jsonl"}, **settings)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "10,000 steps"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}x", "10,000 steps"),
        ("{{ prompt * 10 ** 8 }}", "characters"),
        ("{{ 10 ** (10 ** 9) }}", "exponent"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "no Jinja template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ empty }}", "missing"),
        ("{{ half }}", "half of a character"),
        ("{{ prompt | random }}", "no Jinja template"),
        ("{{ lipsum() }}", "no column 'lipsum'"),
    ],
)
def test_templates_that_cannot_be_rendered_are_one_error(make, template, why):
    rows = [{"prompt": "the", "completion": "cat", "empty": None, "half": "\ud800"}]
    with pytest.raises(TaskError, match=why):
        make(rows, template=template).check()


@pytest.mark.parametrize("choices", [{"a": 1, "b": 2}, ["a", None], ["a", ["b"]], ["a", "\ud800"], ["a", float("nan")]])
def test_choices_are_texts(make, choices):
    with pytest.raises(TaskError, match="texts"):
        make([{"prompt": "the", "options": choices, "label": 0}], choices="options").check()


@pytest.mark.parametrize("label", [None, float("inf"), float("nan"), [0], {}, True, 2, -1, 0.5])
def test_the_right_choice_is_a_position(make, label):
    with pytest.raises(TaskError, match="a position from 0 to 1"):
        make([{"prompt": "the", "options": ["a", "cat"], "label": label}], choices="options").check()


def test_generation_stays_within_the_positions_that_a_model_has_learnt(make, words):
    prompts = ["the cat dog " * 30, "a red dog"]
    rows = [{"prompt": prompt, "completion": "home"} for prompt in prompts]
    task = make(rows, "gpt2", metric="exact_match", max_new_tokens=20)
    notes = task.check()
    assert "1 examples are cut" in notes[0]
    assert "rows.jsonl, row 1" in notes[0]
    assert task.longest == 64
    ids, is_cut = task.prompt_ids(task.split("validation")[0])
    assert (list(ids), is_cut) == (words(prompts[0].strip())["input_ids"][-44:], True)
    assert task.evaluate(task.load_model(), "validation").examples == 2
    for settings in ({"metric": "exact_match"}, {"completion": None}):
        splits = ("validation",) if "metric" in settings else ("train",)
        with pytest.raises(TaskError, match="`max_new_tokens` is 64, which leaves no prompt any of the 64 tokens"):
            make(rows, "gpt2", splits=splits, max_new_tokens=64, **settings).check()


def test_a_prompt_that_is_completed_does_not_depend_on_the_completion(make, words):
    long = {"prompt": "the cat " * 40, "completion": "home " * 30}
    task = make([long, {**long, "completion": "home"}], metric="contains", max_new_tokens=4, max_length=64)
    one, other = (task.prompt_ids(example) for example in task.split("validation"))
    assert one == other == (words(long["prompt"])["input_ids"][-64:], True)


def test_plain_texts_that_are_too_long_are_cut_and_said(make, words):
    text = " ".join(WORDS[n % len(WORDS)] for n in range(100))
    task = make([{"text": "the cat"}, {"text": text}], text="text", max_length=12)
    assert "1 examples are cut to the 12 tokens that are read (first: " in task.check()[0]
    predictions = task.predict(task.load_model(), "validation", np.arange(2))
    expected = np.mean(brute(task.load_model(), words, "</s>", " ".join(text.split()[:11])))
    assert predictions.values[list(task.order("validation")).index(1)] == pytest.approx(expected, abs=1e-5)


def test_bad_rows_of_several_files_are_named_by_their_own(make, heads, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "the", "completion": "cat"}\n' * 3)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "the", "completion": "cat"}\n{"prompt": "the", "completion": " "}\n')
    settings = CausalLMSettings(data={"test": [str(good), str(bad)]})
    with pytest.raises(
        TaskError, match=r"test: .*bad\.jsonl, row 2: the completion '' has no token .*column 'completion'"
    ):
        make_task("lm", settings, heads["llama"]).check()


GRADES = """
def relative_length(generated, completion):
    return len(generated) / len(completion)

def half(generated):
    return 0.5

def none(generated, completion):
    return float("nan")
"""


def test_a_function_of_the_user_s_grades_what_is_generated(make, words, tmp_path, monkeypatch):
    (tmp_path / "my_grades.py").write_text(GRADES)
    monkeypatch.chdir(tmp_path)
    rows = random_rows()
    task = make(rows, metric="my_grades:relative_length", max_new_tokens=4)
    task.check()
    model = task.load_model()
    values = task.predict(model, "validation", np.arange(len(rows))).values
    order = np.random.default_rng(0).permutation(len(rows))
    for value, row in zip(values, (rows[i] for i in order), strict=True):
        ids = words(row["prompt"], return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert value == pytest.approx(len(words.decode(new, True)) / len(row["completion"]))
    assert values.max() > 0
    assert not task.settings.is_percent
    for name, message in (
        ("my_grades:nothing", "has no function 'nothing'"),
        ("nowhere_at_all:f", "cannot import 'nowhere_at_all'"),
        ("my_grades:half", r"cannot be called as function\(generated, completion\)"),
    ):
        with pytest.raises(TaskError, match=message):
            make(rows, metric=name).check()
    with pytest.raises(TaskError, match=r"my_grades:none gave nan on .*rows\.jsonl, row \d"):
        make(rows, metric="my_grades:none").evaluate(model, "validation")
    with pytest.raises(ValueError, match="does not go with `choices`"):
        make(rows, metric="my_grades:none", choices="c")


def test_the_chat_template_belongs_to_what_statistics_and_scores_are_of(make, heads, tmp_path, monkeypatch):
    rows = random_rows()
    before = [make(rows, chat=chat).data_fingerprint("validation") for chat in (True, False)]
    shutil.copytree(heads["llama"], tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(CHAT.replace("<assistant>", "the"))
    monkeypatch.setitem(heads, "other", str(tmp_path / "other"))
    after = [make(rows, "other", chat=chat).data_fingerprint("validation") for chat in (True, False)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]
