import numpy as np
import pytest

from merging.errors import TaskError
from merging.tasks import HarnessSettings

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (mergequest[lm-eval])")


def reported(task, metric, filter="none", **arguments):
    """What the harness itself says of a checkpoint."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    settings = task.settings
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=task.head, device="cpu", dtype="float32", batch_size=3),
        tasks=[settings.task],
        task_manager=TaskManager(include_path=settings.include_path, include_defaults=False),
        bootstrap_iters=0,
        **arguments,
    )
    return results["results"][settings.task][f"{metric},{filter}"]


@pytest.mark.parametrize(
    ("kind", "metric", "filter", "arguments"),
    [
        ("quiz", "acc", None, {}),
        ("quiz", "acc_norm", None, {"num_fewshot": 2}),
        ("quiz", "mcc", None, {"num_fewshot": 1, "limit": 7}),
        ("quiz", "brier_score", None, {"chat": True, "num_fewshot": 2, "system_instruction": "answer"}),
        ("sums", "exact_match", "first-word", {"num_fewshot": 1, "generation": {"max_gen_toks": 2}}),
        ("sums", "bleu", None, {}),
        ("prose", "word_perplexity", None, {}),
    ],
)
def test_scores_are_the_harness_s_own(make, kind, metric, filter, arguments):
    task = make(kind, {"validation": 5}, metric=metric, filter=filter, **arguments)
    task.check()
    own = dict(arguments)
    if "chat" in own:
        own["apply_chat_template"] = own.pop("chat")
    if "generation" in own:
        own["gen_kwargs"] = own.pop("generation")
    expected = reported(task, metric, filter or ("strict" if kind == "sums" else "none"), **own)
    score = task.evaluate(task.load_model(), "test")
    sign = -1 if score.metric.startswith("neg_") else 1
    assert score.value == pytest.approx(sign * expected, rel=1e-6)
    assert score.examples == arguments.get("limit", 9)
    assert sign == (-1 if metric in ("word_perplexity", "brier_score") else 1)
    assert task.is_below_zero == (sign < 0)
    assert np.isfinite(score.standard_error)


def test_a_document_is_answered_alike_alone_and_among_others(make):
    """Also its few-shot examples, which the harness draws document after document."""
    task = make("quiz", {"validation": 8}, num_fewshot=3, metric="brier_score", batch_size=2)
    model = task.load_model()
    every = task.predict(model, "validation", np.arange(8))
    some = task.predict(model, "validation", np.array([5, 0, 3]))
    assert some.values == pytest.approx(every.values[[5, 0, 3]], abs=1e-6)
    joined = type(every).join([every.take(np.array([5])), every.take(np.array([0, 3]))])
    assert task.score(joined).value == pytest.approx(task.score(some).value, abs=1e-6)
    assert task.data_fingerprint("validation") != task.data_fingerprint("test")


def test_documents_of_one_split_are_halved(make):
    task = make("quiz", {"test": 9})
    assert (task.size("train"), task.size("validation"), task.size("test")) == (0, 4, 5)
    whole = make("quiz", {"validation": 0, "test": 9}, splits={"validation": "train"})
    assert (whole.size("validation"), whole.size("test")) == (6, 9)
    model = task.load_model()
    parts = np.concatenate(
        [task.predict(model, split, np.arange(task.size(split))).values for split in ("validation", "test")]
    )
    assert parts.sum() == pytest.approx(whole.predict(model, "test", np.arange(9)).values.sum())


def test_relative_paths_of_data_are_where_the_campaign_was_started(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = make(
        "quiz", {"dataset_kwargs": {"data_files": {"test": "harness/my_quiz.test.jsonl"}, "cache_dir": "c"}, "train": 0}
    )
    monkeypatch.chdir("/")
    assert task.size("test") == 5


@pytest.mark.parametrize(
    ("written", "settings", "message"),
    [
        ({}, {"task": "my_quizz"}, r"no task 'my_quizz'\. Did you mean 'my_quiz'"),
        ({}, {"metric": "acc_nrom"}, r"no metric 'acc_nrom'\. Did you mean 'acc_norm'"),
        ({}, {"filter": "non"}, r"no filter 'non'\. Did you mean 'none'"),
        ({}, {"splits": {"validation": "trian"}}, r"no split 'trian'\. Did you mean 'train'"),
        ({}, {"include_path": "/nowhere"}, "there is no directory /nowhere"),
        ({}, {"generation": {"max_gen_toks": 3}}, "generates nothing"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}, {}, "cannot load its task 'my_quiz'"),
        ({"doc_to_text": "{{ 1 / 0 }}"}, {}, "division by zero"),
        ({"unsafe_code": True}, {}, "runs code that models write"),
        ({"training_split": None, "test_split": None}, {}, "test or|must have valid or test docs"),
    ],
)
def test_what_the_harness_cannot_do_is_one_error(make, written, settings, message):
    with pytest.raises(TaskError, match=message):
        make("quiz", written, **settings).check()


def test_a_file_that_the_harness_passes_over_is_named(make, tmp_path):
    task = make("quiz", task="my_other")
    (tmp_path / "harness" / "other.yaml").write_text("task: my_other\n  broken: [")
    with pytest.raises(TaskError, match=r"cannot read .*other\.yaml"):
        task.check()


def test_groups_are_named_by_their_tasks(make, tmp_path):
    task = make("quiz", task="all_mine")
    (tmp_path / "harness" / "group.yaml").write_text("group: all_mine\ntask: [my_quiz]\n")
    with pytest.raises(TaskError, match=r"'all_mine' is a group of the harness's tasks.*my_quiz"):
        task.check()


def test_generation_that_draws_by_chance_is_refused(make):
    with pytest.raises(ValueError, match="by chance"):
        HarnessSettings(task="x", generation={"do_sample": True})
    with pytest.raises(TaskError, match="by chance"):
        make("sums", {"generation_kwargs": {"do_sample": True, "until": ["x"]}}).check()
    task = make("sums", {"generation_kwargs": {"do_sample": True, "until": ["x"]}}, generation={"do_sample": False})
    task.check()


def test_a_model_that_overflows_is_no_score(make):
    task = make("quiz")
    model = task.load_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TaskError, match="NaN or Inf"):
        task.evaluate(model, "test")
