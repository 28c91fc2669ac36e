"""A real vLLM engine beside transformers: `make test-vllm`."""

import multiprocessing
import os
import signal

import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.errors import EngineError, EngineLostError
from merging.evaluation.engines import EngineSettings
from merging.evaluation.engines.engine_models import EngineModels
from merging.evaluation.engines.vllm_engine import VllmEngine, require_vllm
from merging.evaluation.live_models import LiveModels
from merging.evaluation.steps import EvaluationPlan
from merging.mergers.material import Material
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.tasks import HarnessSettings, make_task
from merging.tasks.language.causal_lm import CausalLMSettings
from merging.testing.engines import EngineTests
from tests.harness_tasks import write_llama, write_task
from tests.merging.evaluation.engines.tiny_llama import task_settings, write_examples, write_pool

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm-env, make test-vllm")

CPU = torch.device("cpu")
VLLM = EngineSettings(kind="vllm", bucket=1, cache=0.1)
RECIPES = [
    base_recipe(),
    member_recipe("two"),
    Recipe("task_arithmetic", {"one": 0.5, "two": 0.7}),
    Recipe("ties", {"one": 0.5, "two": 0.7}),
]


def both(root, engine=VLLM, **settings):
    paths = write_pool(root, **settings)
    pool = Pool.open(paths["base"], {name: paths[name] for name in ("one", "two")})
    data = {"validation": write_examples(root / "data.parquet")}
    tasks = [make_task(name, CausalLMSettings(**result), paths["one"]) for name, result in task_settings(data).items()]
    owners = {task.name: "one" for task in tasks}
    live = LiveModels(Material(pool), tasks, owners, CPU)
    return live, lambda: EngineModels(Material(pool), tasks, owners, CPU, engine)


def test_an_engine_scores_every_candidate_as_transformers_does(tmp_path):
    """With tied heads, whose copy in the engine would keep old weights; in several buckets, and in steps."""
    live, make = both(tmp_path, tied=True)
    engine = make()
    for recipe in RECIPES:
        expected, result = live.measure(recipe, "validation"), engine.measure(recipe, "validation")
        for task, score in expected.scores.items():
            assert result.scores[task].value == pytest.approx(score.value, rel=1e-4, abs=1e-4), (recipe, task)
            assert result.scores[task].loss == pytest.approx(score.loss, abs=1e-4)
    stepwise = engine.measure(RECIPES[2], "validation", plan=EvaluationPlan(5))
    again = live.measure(RECIPES[2], "validation", plan=EvaluationPlan(5))
    for task, values in again.trace.losses.items():
        assert stepwise.trace.losses[task] == pytest.approx(values, abs=1e-4)

    proof = engine._engine.log_likelihoods
    engine._reference = live._models["likelihood"]  # of the last candidate, and what is compared are other weights
    live.measure(base_recipe(), "validation")
    with pytest.raises(
        EngineError, match=r"answers otherwise than transformers.* nats a token .* at token \d+ of probe"
    ):
        engine._prove("a test")
    assert proof([[5, 6, 7]])[0].shape == (2,)

    class Dead:
        def __getattr__(self, name):
            raise RuntimeError("Executor failed.")

    engine._engine._llm = Dead()
    for call in (lambda: engine.measure(base_recipe(), "validation"), lambda: proof([[5, 6]])):
        with pytest.raises(EngineLostError, match=r"the engine has died \(RuntimeError: Executor failed"):
            call()


class TestVllm(EngineTests):
    @pytest.fixture
    def make_engine(self):
        return lambda config: VllmEngine(config.to_dict(), VLLM, torch.float32, 40, untied=False)


def test_the_harness_scores_an_engine_as_it_scores_transformers(tmp_path):
    """All kinds of requests, with few-shot examples, windows of long texts, and stop texts."""
    pytest.importorskip("lm_eval")
    paths = {name: write_llama(tmp_path / name, seed, head_dim=32) for seed, name in enumerate(("base", "one", "two"))}
    pool = Pool.open(paths["base"], {name: paths[name] for name in ("one", "two")})
    requested = {
        "quiz": {"metric": "brier_score", "num_fewshot": 2, "chat": True},
        "cloze": {"metric": "perplexity"},
        "prose": {"max_length": 6},
        "sums": {"metric": "bleu", "generation": {"max_gen_toks": 40, "repetition_penalty": 1.1}},
    }
    tasks = [
        make_task(
            kind,
            HarnessSettings(
                task=f"my_{kind}", include_path=write_task(tmp_path / kind, kind, validation=6), **settings
            ),
            paths["one"],
        )
        for kind, settings in requested.items()
    ]
    owners = {task.name: "one" for task in tasks}
    live = LiveModels(Material(pool), tasks, owners, CPU)
    engine = EngineModels(Material(pool), tasks, owners, CPU, VLLM)
    for recipe in RECIPES:
        expected, measured = live.measure(recipe, "test"), engine.measure(recipe, "test")
        for task, score in expected.scores.items():
            assert measured.scores[task].value == pytest.approx(score.value, rel=1e-4, abs=1e-4), (recipe, task)
    (cloze,) = (task for task in tasks if task.name == "cloze")
    greedy = engine._engine.greedy_likelihoods([[5, 6, 7, 8, 9]] * 2)
    best = live._models[cloze.name](torch.tensor([[5, 6, 7, 8, 9]])).logits[0, :-1].argmax(-1).tolist()
    chosen = [5, 6, 7, 8, 9][1:]
    live_is_greedy = [one == other for one, other in zip(best, chosen, strict=True)]
    assert [flags.tolist() for _, flags in greedy] == [live_is_greedy] * 2


def test_a_model_that_an_engine_fails_on_at_start_is_no_lost_evaluator(tmp_path):
    """vLLM's CPU backend has no attention with heads of 8, and says so once it computes."""
    pytest.importorskip("lm_eval")
    pool = Pool.open(write_llama(tmp_path / "base", 0), {"one": write_llama(tmp_path / "one", 1)})
    task = make_task(
        "quiz", HarnessSettings(task="my_quiz", include_path=write_task(tmp_path / "t", "quiz")), str(tmp_path / "one")
    )
    with pytest.raises(EngineError, match="head_dim") as caught:
        EngineModels(Material(pool), [task], {"quiz": "one"}, CPU, VLLM)
    assert not isinstance(caught.value, EngineLostError)


def test_an_engine_of_a_16_bit_pool(tmp_path):
    live, make = both(tmp_path, dtype=torch.bfloat16)
    engine = make()
    for recipe in RECIPES[:3]:
        expected, result = live.measure(recipe, "validation"), engine.measure(recipe, "validation")
        assert result.scores["likelihood"].value == pytest.approx(expected.scores["likelihood"].value, abs=0.05)


def test_a_model_that_no_engine_serves_is_named():
    with pytest.raises(EngineError, match=r"vLLM serves no CTRLLMHeadModel: leave out `engine: vllm`"):
        require_vllm({"architectures": ["CTRLLMHeadModel"]})
    with pytest.raises(EngineError, match=r"serves no model whose config.json has no `architectures`"):
        require_vllm({})


@pytest.mark.slow
def test_an_engine_of_two_processes_scores_as_one_and_is_lost_with_either(tmp_path):
    live, make = both(tmp_path, EngineSettings(kind="vllm", bucket=1, cache=0.1, tensor_parallel=2), tied=True)
    engine = make()
    for recipe in RECIPES[2:]:
        expected, result = live.measure(recipe, "validation"), engine.measure(recipe, "validation")
        for task, score in expected.scores.items():
            assert result.scores[task].value == pytest.approx(score.value, rel=1e-4, abs=1e-4), (recipe, task)
    (*_, worker) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EngineLostError, match="the engine has died"):
        engine.measure(RECIPES[2], "validation")
