"""What is looked at before an engine starts; no engine is needed."""

from importlib.util import find_spec

import pytest
import torch
from transformers import GenerationConfig

from merging.checkpoints.pool import Pool
from merging.errors import EngineError
from merging.evaluation.engines import EngineSettings
from merging.evaluation.engines.engine_models import check_engine
from merging.evaluation.engines.vllm_engine import buckets, require_served
from merging.evaluation.live_models import LiveModels
from merging.mergers.material import Material
from merging.recipe import base_recipe
from merging.tasks import TextClassificationSettings, make_task
from merging.tasks.language.causal_lm import CausalLMSettings
from tests.live_engine import Transformers
from tests.merging.evaluation.engines.tiny_llama import task_settings, write_examples, write_pool


def test_a_task_asks_an_engine_for_what_it_asks_a_model(tmp_path):
    paths = write_pool(tmp_path)
    data = {"validation": write_examples(tmp_path / "data.parquet", 6)}
    tasks = [make_task(name, CausalLMSettings(**result), paths["one"]) for name, result in task_settings(data).items()]
    pool = Pool.open(paths["base"], {"one": paths["one"]})
    live = LiveModels(Material(pool), tasks, dict.fromkeys((task.name for task in tasks), "one"), torch.device("cpu"))
    expected = live.measure(base_recipe(), "validation").scores
    model = live._models["likelihood"]
    model.config.use_cache = True
    for task in tasks:
        result = task.evaluate(Transformers(model), "validation")
        assert result.value == pytest.approx(expected[task.name].value, rel=1e-5)
        assert result.loss == pytest.approx(expected[task.name].loss, abs=1e-5)


def test_what_no_engine_answers_is_refused_before_it_starts(tmp_path, tiny_pool, tiny_campaign):
    labels = make_task("one", TextClassificationSettings(**tiny_campaign["tasks"]["one"]), str(tiny_pool["one"]))
    pool = Pool.open(str(tiny_pool["base"]), {"one": str(tiny_pool["one"])})
    with pytest.raises(EngineError, match="task 'one' is of kind 'text_classification'"):
        check_engine(pool, [labels], {"one": "one"}, EngineSettings(kind="vllm"))
    paths = write_pool(tmp_path)
    data = {"validation": write_examples(tmp_path / "data.parquet", 4)}
    task = make_task("lm", CausalLMSettings(data=data), paths["one"])
    own = Pool.open(paths["base"], {"one": paths["one"]}, ("lm_head.*",))
    with pytest.raises(EngineError, match=r"holds one model for all tasks, and 'lm_head.weight' is kept"):
        check_engine(own, [task], {"lm": "one"}, EngineSettings(kind="vllm"))
    whole = Pool.open(paths["base"], {"one": paths["one"]})
    with pytest.raises(
        EngineError, match=r"tensor_parallel: 3 processes cannot share the 2 attention heads of .*: use 1 or 2"
    ):
        check_engine(whole, [task], {"lm": "one"}, EngineSettings(kind="vllm", tensor_parallel=3))
    with pytest.raises(EngineError, match="no_repeat_ngram_size: 3"):
        require_served(GenerationConfig(no_repeat_ngram_size=3))
    require_served(GenerationConfig(repetition_penalty=1.1, eos_token_id=[2, 3]))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_says_how_to_get_it(tmp_path):
    paths = write_pool(tmp_path)
    data = {"validation": write_examples(tmp_path / "data.parquet", 4)}
    task = make_task("lm", CausalLMSettings(data=data), paths["one"])
    with pytest.raises(EngineError, match=r"mergequest\[vllm\].*make vllm-env"):
        check_engine(
            Pool.open(paths["base"], {"one": paths["one"]}), [task], {"lm": "one"}, EngineSettings(kind="vllm")
        )


def test_weights_travel_in_buckets_of_a_size():
    weights = [(str(number), torch.zeros(size)) for number, size in enumerate((10, 20, 100, 5, 5))]
    result = [[name for name, _ in bucket] for bucket in buckets(weights, 4 * 30)]
    assert result == [["0", "1"], ["2"], ["3", "4"]]
    assert list(buckets([], 10)) == []
