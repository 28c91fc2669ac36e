"""A campaign that lm-evaluation-harness judges, from the file to the exported winner."""

import json

import pandas as pd
import pytest
import yaml

from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import MergequestError
from tests.harness_tasks import rows, write_llama, write_task

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (mergequest[lm-eval])")


@pytest.fixture
def judged(tmp_path):
    """A campaign file of two members, each with its own task of the harness and texts of its own."""
    for seed, name in enumerate(("base", "quiz", "prose")):
        write_llama(tmp_path / name, seed)
    write_task(tmp_path / "harness", "quiz", validation=8, test=10)
    write_task(tmp_path / "harness", "prose", validation=6, test=6)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows(12, 3)))
    calibration = {"kind": "causal_lm", "data": {"train": "texts.jsonl"}, "text": "text"}
    settings = {
        "name": "harness",
        "directory": "out",
        "base": "base",
        "members": {name: {"checkpoint": name, "calibration": calibration} for name in ("quiz", "prose")},
        "tasks": {
            name: {"kind": "lm_eval", "task": f"my_{name}", "include_path": "harness"} for name in ("quiz", "prose")
        },
        "statistics": {"gram": {"examples": 12}},
        "search": {"methods": ["average", "regmean"], "candidates": 4, "pruning": "none"},
        "selection": {"mode": "all"},
        "resources": {"evaluators": 1},
    }

    def write(**changes):
        (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings | changes))
        return str(tmp_path / "campaign.yaml")

    return write


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_task_that_the_harness_does_not_know_is_found_before_any_work(judged, tmp_path):
    tasks = {name: {"kind": "lm_eval", "task": "my_quizz", "include_path": "harness"} for name in ("quiz", "prose")}
    with pytest.raises(MergequestError, match="Did you mean 'my_quiz'"):
        run(load_campaign(judged(tasks=tasks)), Display())
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_winner_s_score_is_the_harness_s_own(judged, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    run(load_campaign(judged()), Display())
    frame = pd.read_parquet(tmp_path / "out" / "ledger")
    assert (frame.status == "complete").all()
    assert {"average", "regmean"} <= set(frame.method)
    tested = frame[(frame.split == "test") & ~frame.method.isin(["base", "member"])]
    winner = json.loads((tmp_path / "out" / "exports" / "best" / ".mergequest.json").read_text())
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "out" / "exports" / "best"), device="cpu", dtype="float32", batch_size=4),
        tasks=["my_quiz", "my_prose"],
        task_manager=TaskManager(include_path=str(tmp_path / "harness"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert winner
    scores = [dict(result) for result in tested.scores]
    wanted = {"quiz": results["my_quiz"]["acc,none"], "prose": -results["my_prose"]["word_perplexity,none"]}
    assert any(result == pytest.approx(wanted, rel=1e-5) for result in scores), (scores, wanted)
