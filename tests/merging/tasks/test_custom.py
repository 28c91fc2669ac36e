import math
import sys

import pytest
import torch
from pydantic import ValidationError

from merging.errors import TaskError
from merging.tasks import CustomSettings, make_task

SOURCE = """
import torch

CONSTANT = 3

def norm(model, checkpoint, split, limit, scale=1.0):
    weight = next(model.parameters())
    return float(weight.detach().norm()) * scale

def full(model, checkpoint, split, limit):
    return {"value": torch.tensor(0.5), "standard_error": 0.1, "examples": limit or 9}

def given(model, checkpoint, split, limit, result=None):
    return result

def not_finite(model, checkpoint, split, limit):
    return float("nan")

def broken(model, checkpoint, split, limit):
    raise RuntimeError("out of paint")

def leaving(model, checkpoint, split, limit):
    raise SystemExit(1)

def narrow(model):
    return 0.0

def seen(model, checkpoint, split, limit):
    return {"value": (len(checkpoint) > 0) + 10 * (split == "test") + 100 * (limit or 0)}
"""


@pytest.fixture
def custom(tmp_path, monkeypatch, head):
    (tmp_path / "my_scores.py").write_text(SOURCE)
    (tmp_path / "my_broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "my_script.py").write_text("import sys; sys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_scores", None)
    return lambda evaluator, head=head, **settings: make_task(
        "mine", CustomSettings(evaluator=evaluator, **settings), head
    )


def test_number(custom):
    task = custom("my_scores:norm", arguments={"scale": 2.0}, metric="norm")
    model = task.load_model()
    score = task.evaluate(model, "validation")
    assert score.value == pytest.approx(2 * next(model.parameters()).norm().item())
    assert score.metric == "norm"
    assert math.isnan(score.standard_error)
    assert math.isnan(score.loss)
    assert not task.has_logits


def test_mapping(custom):
    task = custom("my_scores:full")
    score = task.evaluate(task.load_model(), "test", limit=4)
    assert (score.value, score.standard_error, score.examples) == (0.5, 0.1, 4)


def test_arguments_of_the_call(custom):
    task = custom("my_scores:seen", examples={"test": 30})
    assert task.evaluate(task.load_model(), "test", limit=5).value == 511
    assert (task.size("test"), task.size("train")) == (30, 0)


def test_examples_from_the_settings(custom):
    task = custom("my_scores:norm", examples={"validation": 30})
    model = task.load_model()
    assert task.evaluate(model, "validation").examples == 30
    assert task.evaluate(model, "validation", limit=7).examples == 7


@pytest.mark.parametrize(
    ("evaluator", "settings", "message"),
    [
        ("my_scores:nrm", {}, "module 'my_scores' has no function 'nrm'"),
        ("my_absent:norm", {}, "cannot import 'my_absent' .*PYTHONPATH"),
        ("my_broken:norm", {}, "a_module_that_is_not_there"),
        ("my_script:norm", {}, "SystemExit: 3"),
        ("my_scores:CONSTANT", {}, "is no function but int"),
        ("my_scores:narrow", {}, "cannot be called as function"),
        ("my_scores:norm", {"arguments": {"skale": 1}}, r"with the arguments \['skale'\]"),
        ("my_scores:norm", {"model_class": "AutoModelForCausalLLM"}, "Did you mean 'AutoModelForCausalLM'"),
    ],
)
def test_check_finds(custom, evaluator, settings, message):
    with pytest.raises(TaskError, match=rf"task 'mine': .*{message}"):
        custom(evaluator, **settings).check()


def test_the_working_directory_is_searched_after_all_else(custom, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "my_namespace").mkdir(parents=True)
    (tmp_path / "my_namespace").mkdir()  # as there are among installed packages
    for name in ("my_own", "my_scores", "yaml", "my_namespace/__init__"):
        (here / f"{name}.py").write_text("def own():\n    return 1.0\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    assert custom("my_own:own").data_fingerprint("test")
    for name in ("my_scores", "yaml", "my_namespace"):
        with pytest.raises(TaskError, match=rf"module '{name}' has no function 'own': it is .*rename"):
            custom(f"{name}:own").check()


def test_check_notes(custom):
    (note,) = custom("my_scores:norm").check()
    assert "no statistics" in note


@pytest.mark.parametrize(
    ("evaluator", "arguments", "message"),
    [
        ("my_scores:broken", {}, "failed: RuntimeError: out of paint"),
        ("my_scores:not_finite", {}, "gave nan on test: a score must be finite"),
        ("my_scores:given", {}, "returned None as value"),
        ("my_scores:leaving", {}, "SystemExit"),
        ("my_scores:given", {"result": torch.tensor(1j)}, "as value: a number is needed"),
        ("my_scores:given", {"result": "good"}, "returned 'good' as value"),
        ("my_scores:given", {"result": True}, "returned True as value"),
        ("my_scores:given", {"result": {"value": 1.0, "accuracy": 0.5}}, r"returned \['accuracy'\]"),
        ("my_scores:given", {"result": {"examples": 3}}, "returned None as value"),
    ],
)
def test_evaluate_refuses(custom, evaluator, arguments, message):
    task = custom(evaluator, arguments=arguments)
    with pytest.raises(TaskError, match=f"task 'mine': .*{message}"):
        task.evaluate(torch.nn.Linear(1, 1), "test")


def test_has_nothing_for_statistics(custom):
    with pytest.raises(TaskError, match="no batches"):
        custom("my_scores:norm").batches("train", 0, 1, 1)


def test_fingerprint_follows_code_and_arguments(custom, tmp_path):
    task = custom("my_scores:norm")
    actual = {
        task.data_fingerprint("test"),
        task.data_fingerprint("validation"),
        custom("my_scores:norm", arguments={"scale": 3}).data_fingerprint("test"),
    }
    (tmp_path / "my_scores.py").write_text(SOURCE.replace("):\n", "):  # changed\n\n") + "\n# changed\n")
    actual.add(task.data_fingerprint("test"))
    assert len(actual) == 3
    (tmp_path / "my_scores.py").write_text(SOURCE + "\nTHRESHOLD = 2\n")
    actual.add(task.data_fingerprint("test"))
    (tmp_path / "my_scores.py").write_text("no Python (")
    actual.add(task.data_fingerprint("test"))
    assert len(actual) == 5


def test_every_split_is_measured_unless_some_are_named(custom):
    task = custom("my_scores:norm")
    assert [task.has_split(split) for split in ("validation", "test")] == [True, True]
    task = custom("my_scores:norm", examples={"validation": 30})
    assert [task.has_split(split) for split in ("validation", "test")] == [True, False]


def test_evaluator_is_module_and_function():
    with pytest.raises(ValidationError):
        CustomSettings(evaluator="os.system")
    with pytest.raises(ValidationError):
        CustomSettings(evaluator="os:system; rm")


def test_values_of_single_examples_make_a_score_that_pairs(custom):
    task = custom("my_scores:given", arguments={"result": {"values": [1.0, 0.0, 0.5]}})
    score, predictions = task.measure(task.load_model(), "validation")
    assert (score.value, score.examples, score.is_mean) == (0.5, 3, True)
    assert predictions.values.tolist() == [1.0, 0.0, 0.5]
    assert predictions.losses is None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"values": [1.0], "value": 1.0}, "their mean is the score"),
        ({"values": []}, "one per example"),
        ({"values": [[1.0]]}, "one per example"),
        ({"values": ["x"]}, "are no numbers"),
        ({"values": [1.0, math.inf]}, "NaN or Inf"),
    ],
)
def test_values_that_make_no_score_are_refused(custom, result, message):
    task = custom("my_scores:given", arguments={"result": result})
    with pytest.raises(TaskError, match=message):
        task.measure(task.load_model(), "validation")


@pytest.mark.parametrize(
    "result",
    [
        {"value": 0.5, "examples": 10**30},
        {"value": 0.5, "examples": -10},
        {"value": 0.5, "examples": 2.5},
        {"value": 0.5, "examples": math.nan},
        {"value": 0.5, "examples": math.inf},
        {"value": 0.5, "standard_error": -1.0},
        {"value": 0.5, "standard_error": math.inf},
        {"value": 10**400},
    ],
)
def test_an_answer_that_is_no_measurement_is_refused(custom, result):
    task = custom("my_scores:given", arguments={"result": result})
    with pytest.raises(TaskError, match="task 'mine': my_scores:given (gave|returned) "):
        task.evaluate(torch.nn.Linear(1, 1), "validation")


def test_references_to_the_environment_are_resolved_where_the_function_is_called(custom, monkeypatch):
    arguments = {"result": {"value": "${JUDGE_KEY}"}}
    task = custom("my_scores:given", arguments=arguments)
    with pytest.raises(TaskError, match="the environment variable JUDGE_KEY is not set here"):
        task.check()
    before = task.data_fingerprint("test")
    monkeypatch.setenv("JUDGE_KEY", "sk-live-0123456789")
    task.check()
    with pytest.raises(TaskError, match=r"returned '\$\{JUDGE_KEY\}' as value") as caught:
        task.evaluate(task.load_model(), "validation")
    assert "sk-live" not in str(caught.value)
    assert task.settings.model_dump(mode="json")["arguments"] == arguments
    assert task.data_fingerprint("test") == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"api_key": "sk-live-123"},
        {"endpoint": "https://u:pw@host/v1"},
        {"options": {"headers": [{"Authorization": "Bearer abcdefgh12345"}]}},
        {"urls": ["https://host/v1?token=abc"]},
        {"anything": "hf_abcdefghijklmnopqrst"},
    ],
)
def test_secrets_written_out_are_refused(custom, arguments):
    with pytest.raises(ValueError, match="looks like a secret") as caught:
        custom("my_scores:given", arguments=arguments)
    assert "write ${" in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"api_key": "${JUDGE_KEY}", "endpoint": "https://host/v1?version=2"},
        {"headers": {"Authorization": "Bearer ${JUDGE_KEY}"}},
        {"max_tokens": 5, "token_count": "12", "tokenizer": "checkpoints/base", "password": ""},
    ],
)
def test_what_is_no_secret_passes(custom, arguments):
    assert custom("my_scores:given", arguments=arguments).settings.arguments == arguments


LONG = "Zx81" * 6


@pytest.mark.parametrize(
    "arguments",
    [
        {"openai_key": LONG},
        {"auth": "me:word"},
        {"cookie": "a=b"},
        {"command": ["judge", "--token", LONG]},
        {"x": "AKIA" + "IOSFODNN7EXAMPLE"},
        {"x": "AIza" + "b" * 35},
        {"x": ".".join(["eyJ" + LONG, LONG, LONG])},
        {"x": "-----BEGIN RSA PRIVATE KEY-----\nabc"},
    ],
)
def test_secrets_of_more_shapes_are_refused(arguments):
    with pytest.raises(ValueError, match="looks like a secret"):
        CustomSettings(evaluator="a:b", arguments=arguments)


def test_keys_of_columns_are_no_secrets():
    for arguments in (
        {"label_key": "label"},
        {"key": "a_long_name_of_a_column"},
        {"command": ["--batch", "8", "--key", "text"]},
    ):
        assert CustomSettings(evaluator="a:b", arguments=arguments).arguments == arguments
