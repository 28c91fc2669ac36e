import sys
from types import ModuleType

import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.errors import PoolError
from merging.evaluation.live_models import LiveModels
from merging.evaluation.shared_weights import SharedWeights
from merging.evaluation.spread_models import Spread, blocks_of, shares
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.mergers.spread import SpreadMerger, moved
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.tasks import CustomSettings, make_task
from tests.merging.evaluation.tiny_models import FAMILIES

CPU = torch.device("cpu")
pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture
def probe(monkeypatch):
    """An importable module whose `score` remembers what a model gives."""
    module = ModuleType("spread_probe")

    def score(model, checkpoint, split, limit):
        module.seen = module.family.output(model)
        return float(module.seen.mean())

    module.score = score
    monkeypatch.setitem(sys.modules, "spread_probe", module)
    return module


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama_tied", 2),
        ("mixtral", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", 4), ("bert", 2), ("t5", 3), ("gpt2", 4))),
    ],
)
def test_a_model_over_several_devices_is_the_model(name, count, tmp_path, probe):
    """The devices are the CPU several times: what is on trial is that every layer has its weights, and inputs follow."""
    family = probe.family = FAMILIES[name]
    paths = {}
    for where, model in {"base": family.make(), "one": family.changed(1), "two": family.changed(2)}.items():
        model.save_pretrained(tmp_path / where)
        paths[where] = str(tmp_path / where)
    material = Material(Pool.open(paths["base"], {key: paths[key] for key in ("one", "two")}))
    owners = {"one": "one", "two": "two"}
    tasks = [
        make_task(key, CustomSettings(evaluator="spread_probe:score", model_class=family.auto), paths[key])
        for key in owners
    ]
    spread = LiveModels(material, tasks, owners, CPU, devices=[CPU] * count)
    whole = LiveModels(material, tasks, owners, CPU)
    parts = spread._spread.parts(spread._out)
    assert sum(map(len, parts)) == len(material.pool.weights)
    assert sum(bool(part) for part in parts) >= 2
    for recipe in (
        Recipe("ties", {"one": 0.7, "two": 0.4}),
        Recipe("breadcrumbs", {"one": 0.7, "two": 0.4}),
        member_recipe("two"),
        base_recipe(),
    ):
        result, expected = spread.measure(recipe, "validation"), whole.measure(recipe, "validation")
        assert {key: score.value for key, score in result.scores.items()} == {
            key: score.value for key, score in expected.scores.items()
        }
        assert result.report == expected.report


@pytest.mark.parametrize(
    "method", ["ties", "della", "breadcrumbs", "slerp", "model_stock", "fisher", "regmean", "tsv_m"]
)
def test_parts_merge_bit_for_bit_what_one_device_merges(tiny_material, method):
    material = tiny_material.material
    members = ["one", "two"] if method == "slerp" else ["one", "two", "three"]
    names = list(material.pool.weights)

    def empty(chosen):
        return {name: torch.full(tuple(material.pool.weights[name].shape), torch.nan) for name in chosen}

    expected, outs = empty(names), [empty(names[::3]), {}, empty(names[1::3]), empty(names[2::3])]
    resident, spread = ResidentMerger(material, expected), SpreadMerger(material, outs)
    for scaling in (0.3, 0.5):
        recipe = Recipe(method, dict.fromkeys(members, scaling))
        report = resident.merge(recipe)
        assert spread.merge(recipe) == report
        for out in outs:
            for name, value in out.items():
                assert torch.equal(value, expected[name]), name


def test_layers_go_to_devices_by_their_bytes_in_order():
    assert shares([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert shares([6, 1, 1], 2) == [0, 1, 1]
    assert shares([0, 5, 5, 0], 4) == [0, 1, 3, 3]
    assert shares([0, 0], 2) == [0, 0]
    kinds = [type(block).__name__ for block in blocks_of(FAMILIES["llama"].make())]
    assert kinds == [
        "Embedding",
        "LlamaDecoderLayer",
        "LlamaDecoderLayer",
        "LlamaRMSNorm",
        "LlamaRotaryEmbedding",
        "Linear",
    ]


def test_what_is_copied_after_every_merge_cannot_be_spread():
    shared = SharedWeights((), (), [lambda: None], (), ())
    with pytest.raises(PoolError, match=r"cannot be spread over several GPUs: set resources.gpus: 1"):
        Spread([CPU, CPU]).place(torch.nn.Linear(2, 2), shared, {})


def test_what_a_method_knows_travels_with_its_tensors():
    value = {"a": [torch.ones(2), (1, torch.zeros(1))], "b": None}
    result = moved(value, torch.device("meta"))
    assert result["a"][0].is_meta
    assert result["a"][1][1].is_meta
    assert result["b"] is None
