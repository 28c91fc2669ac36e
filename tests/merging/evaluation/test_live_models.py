import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from merging.checkpoints.pool import Pool
from merging.errors import TaskError
from merging.evaluation.live_models import LiveModels
from merging.evaluation.shared_weights import share_weights, sharing_model
from merging.evaluation.steps import EvaluationPlan
from merging.mergers.material import Material
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.tasks import CustomSettings, TextClassificationSettings, make_task

OWNERS = {"one": "one", "two": "two"}


@pytest.fixture(scope="module")
def live(tiny_pool, tiny_campaign):
    members = {name: str(tiny_pool[name]) for name in ("one", "two", "three")}
    material = Material(Pool.open(str(tiny_pool["base"]), members))
    tasks = [
        make_task(name, TextClassificationSettings(**tiny_campaign["tasks"][name]), members[OWNERS[name]])
        for name in OWNERS
    ]
    return LiveModels(material, tasks, OWNERS, torch.device("cpu"))


def test_a_member_scores_as_its_own_model(live, tiny_pool, tiny_campaign):
    result = live.measure(member_recipe("two"), "validation").scores["two"]
    task = make_task("two", TextClassificationSettings(**tiny_campaign["tasks"]["two"]), str(tiny_pool["two"]))
    expected = task.evaluate(AutoModelForSequenceClassification.from_pretrained(tiny_pool["two"]).eval(), "validation")
    assert (result.value, result.loss, result.expected_error) == (
        expected.value,
        expected.loss,
        expected.expected_error,
    )


def test_all_tasks_see_the_merge(live, tiny_pool):
    before = live.measure(base_recipe(), "validation")
    after = live.measure(Recipe("task_arithmetic", {"one": 0.5, "two": 0.5}), "validation")
    assert all(before.scores[task].loss != after.scores[task].loss for task in OWNERS)
    again = live.measure(base_recipe(), "validation")
    assert {task: score.loss for task, score in again.scores.items()} == {
        task: score.loss for task, score in before.scores.items()
    }


def test_limit_reaches_the_task(live):
    assert live.measure(base_recipe(), "validation", limit=7).scores["one"].examples == 7


def test_of_a_head_s_checkpoint_only_the_head_is_read(tiny_pool, tiny_campaign, upload, unreliable, s3_at):
    root = s3_at(unreliable.url)
    upload(tiny_pool["base"], f"{root}/base")
    upload(tiny_pool["two"], f"{root}/two")
    pool = Pool.open(f"{root}/base", {"two": f"{root}/two"})
    out = {name: torch.randn(info.shape) for name, info in pool.weights.items()}
    settings = TextClassificationSettings(**tiny_campaign["tasks"]["two"])
    unreliable.reset()
    model, shared = sharing_model(make_task("two", settings, f"{root}/two"), pool, pool.members["two"], out)
    weights = [span for method, path, span in unreliable.requests if path.endswith(".safetensors") and method == "GET"]
    assert len(weights) == 3  # header's length, header, head
    assert unreliable.sent < 0.4 * pool.members["two"].checkpoint.nbytes
    assert shared.held == set(out)
    whole = AutoModelForSequenceClassification.from_pretrained(tiny_pool["two"])
    for name, value in whole.state_dict().items():
        own = name.removeprefix("bert.")
        assert torch.equal(model.state_dict()[name], out.get(own, value))


def test_a_weight_that_cannot_be_shared_is_the_checkpoint_s_own(tiny_pool, tiny_campaign):
    whole = Pool.open(str(tiny_pool["base"]), {"two": str(tiny_pool["two"])})
    hidden = next(name for name in whole.weights if name.endswith("query.weight"))
    task = make_task("two", TextClassificationSettings(**tiny_campaign["tasks"]["two"]), str(tiny_pool["two"]))
    member = whole.members["two"]
    pool = Pool(whole.base, whole.members, {name: info for name, info in whole.weights.items() if name != hidden})
    out = {name: torch.zeros(info.shape) for name, info in pool.weights.items()}
    model, shared = sharing_model(task, pool, member, out)
    assert hidden not in shared.held
    assert torch.equal(model.state_dict()[member.names[hidden]], whole.member_weight("two", hidden))


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "member")
    pool = Pool.open(str(tmp_path / "base"), {"member": str(tmp_path / "member")})
    out = {name: torch.zeros(info.shape) for name, info in pool.weights.items()}
    shared = share_weights(model, pool, pool.members["member"], out)
    assert shared.held == set(out)
    out["bert.embeddings.word_embeddings.weight"].fill_(3.0)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert float(model.cls.predictions.decoder.weight[0, 0]) == 3.0


def test_how_far_a_measurement_is_is_told(live):
    told = []
    live.measure(base_recipe(), "validation", progress=told.append)
    assert told == [0.5, 1.0]  # by task
    told.clear()
    live.measure(base_recipe(), "validation", 25, EvaluationPlan(10), told.append)
    assert told == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.9, 1.0])  # by examples of both


def test_steps_end_where_the_whole_ends(live):
    recipe = Recipe("task_arithmetic", {"one": 0.5, "two": 0.5})
    whole = live.measure(recipe, "validation", limit=25)
    seen = []
    result = live.measure(recipe, "validation", 25, EvaluationPlan(10, lambda trace: bool(seen.append(trace.examples))))
    assert not result.pruned
    assert seen == [10, 20]
    assert [step["two"].examples for step in result.trace.scores] == [10, 20, 25]
    for task in OWNERS:
        assert result.scores[task].value == whole.scores[task].value
        assert result.scores[task].loss == pytest.approx(whole.scores[task].loss, abs=1e-6)
        assert result.trace.values[task].mean() == pytest.approx(whole.scores[task].value)
        assert 1 - result.trace.surrogates[task].mean() == pytest.approx(whole.scores[task].expected_error, abs=1e-6)


def test_a_gate_stops_and_the_scores_are_those_so_far(live):
    recipe = Recipe("task_arithmetic", {"one": 0.5, "two": 0.5})
    result = live.measure(recipe, "validation", plan=EvaluationPlan(8, lambda trace: trace.examples >= 16))
    first = live.measure(recipe, "validation", limit=16)
    assert result.pruned
    assert {score.examples for score in result.scores.values()} == {16}
    assert [result.scores[task].value for task in OWNERS] == [first.scores[task].value for task in OWNERS]


def _train(model):
    model.train()


def _half(model):
    model.half()


def _double(model):
    model.double()


def _frozen_copy(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _exchanged(model):
    model.base_model.pooler = torch.nn.Identity()


def _hook(model):
    model.base_model.encoder.register_forward_hook(lambda module, args, output: None)


def _written(model):
    with torch.no_grad():
        next(model.parameters()).mul_(2)


def _written_behind(model):
    next(model.parameters()).data.mul_(2)


def _written_and_half(model):
    _written(model)
    model.half()


def _raises(model):
    model.half()
    raise RuntimeError("half done")


@pytest.fixture
def lent(monkeypatch, tiny_pool):
    """`lent(change)`: live models whose evaluator changes the model after it scored it, `module.change` permitting."""
    module = ModuleType("changing")

    def score(model, checkpoint, split, limit):
        value = float(sum(p.double().abs().sum() for p in model.parameters())) + model.training
        if module.change is not None:
            module.change(model)
        return value

    module.score = score
    monkeypatch.setitem(sys.modules, "changing", module)
    members = {name: str(tiny_pool[name]) for name in ("one", "two")}
    material = Material(Pool.open(str(tiny_pool["base"]), members))
    tasks = [make_task(name, CustomSettings(evaluator="changing:score"), members[name]) for name in members]

    def make(change):
        module.change = None
        live = LiveModels(material, tasks, OWNERS, torch.device("cpu"))
        expected = live.measure(member_recipe("two"), "validation").scores
        module.change = change
        return live, module, {name: score.value for name, score in expected.items()}

    return make


@pytest.mark.parametrize("change", [_train, _half, _double, _frozen_copy, _exchanged, _hook])
def test_an_evaluator_that_changes_the_model_changes_no_later_score(lent, change):
    live, _, expected = lent(change)
    for recipe in (base_recipe(), member_recipe("two"), Recipe("task_arithmetic", {"one": 0.5}), member_recipe("two")):
        scores = live.measure(recipe, "validation").scores
    assert {name: score.value for name, score in scores.items()} == expected


@pytest.mark.parametrize("change", [_written, _written_behind, _written_and_half])
def test_an_evaluator_that_writes_into_the_weights_is_refused(lent, change):
    live, module, expected = lent(change)
    with pytest.raises(
        TaskError, match=r"task 'one': .* wrote into the model's weights \(bert.embeddings.word_emb.* copy"
    ):
        live.measure(base_recipe(), "validation")
    module.change = None
    scores = live.measure(member_recipe("two"), "validation").scores
    assert {name: score.value for name, score in scores.items()} == expected


def test_an_evaluator_that_fails_half_way_leaves_no_trace(lent):
    live, module, expected = lent(_raises)
    with pytest.raises(TaskError, match="half done"):
        live.measure(base_recipe(), "validation")
    module.change = None
    scores = live.measure(member_recipe("two"), "validation").scores
    assert {name: score.value for name, score in scores.items()} == expected
