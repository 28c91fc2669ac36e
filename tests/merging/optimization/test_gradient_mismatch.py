import pytest
import torch
from torch.nn.functional import log_softmax

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.optimization.gradient_mismatch import gradient_mismatch, quadratic_mismatch
from merging.recipe import member_recipe
from merging.statistics import STATISTICS, LikelihoodSettings, measure, save
from merging.tasks import TextClassificationSettings, make_task

MEMBERS = ("one", "two")
ALPHA = {"one": 0.5, "two": 1.5}
COUNTS = {"one": 24, "two": 10}


@pytest.fixture(scope="module")
def opened(tiny_campaign):
    pool = Pool.open(tiny_campaign["base"], {m: tiny_campaign["members"][m]["checkpoint"] for m in MEMBERS})
    tasks = {
        m: make_task(m, TextClassificationSettings(**tiny_campaign["tasks"][m]), pool.members[m].checkpoint.path)
        for m in MEMBERS
    }
    return pool, tasks


def merged(pool, recipe):
    out = {name: torch.empty(info.shape) for name, info in pool.weights.items()}
    ResidentMerger(Material(pool), out).merge(recipe)
    return out


def test_is_the_difference_of_gradients_under_the_members_own_labels(opened):
    pool, tasks = opened
    weights = merged(pool, METHODS["average"].default_recipe(MEMBERS))
    total, own_norms = {}, {}
    for member, task in tasks.items():
        names = {own: name for name, own in pool.members[member].names.items()}
        (batch,) = task.batches("train", 0, 24, 24)
        with torch.no_grad():
            labels = task.logits(task.load_model(), batch).softmax(-1)
        gradients = []
        for values in (weights, {}):
            model = task.load_model()
            moved = {own: values[name] for own, name in names.items() if name in values}
            model.load_state_dict(moved, strict=False)
            loss = -(labels * log_softmax(task.logits(model, batch), -1)).sum(-1).mean()
            loss.backward()
            gradients.append({names[own]: p.grad for own, p in model.named_parameters() if own in names})
        at_merged, at_own = gradients
        scale = ALPHA[member] * COUNTS[member]
        parts = {name: scale * (at_merged[name] - at_own[name]).double() for name in at_merged}
        own_norms[member] = sum(float(part.square().sum()) for part in parts.values()) ** 0.5
        for name, part in parts.items():
            total[name] = total.get(name, 0) + part
    found = gradient_mismatch(pool, tasks, weights, ALPHA, counts=COUNTS, batch_size=7)
    assert found.total == pytest.approx(sum(float(v.square().sum()) for v in total.values()) ** 0.5, rel=1e-3)
    assert found.members == pytest.approx(own_norms, rel=1e-3)
    assert found.total > 1e-3


def test_a_member_has_none_at_its_own_weights(opened):
    pool, tasks = opened
    found = gradient_mismatch(pool, tasks, merged(pool, member_recipe("two")), {"two": 1.0})
    other = gradient_mismatch(pool, tasks, merged(pool, member_recipe("one")), {"two": 1.0})
    assert found.total < 1e-5 < other.total


def test_the_stand_in_is_its_formula(opened, tmp_path):
    pool, tasks = opened
    statistic = STATISTICS["fisher"](LikelihoodSettings(examples=8))
    files = {
        m: save(
            str(tmp_path / m),
            statistic,
            measure(tasks[m], statistic),
            checkpoint=pool.members[m].checkpoint.fingerprint,
            data="d",
        )
        for m in MEMBERS
    }
    material = Material(pool, {"fisher": files}, COUNTS)
    weights = merged(pool, METHODS["average"].default_recipe(MEMBERS))
    square = 0.0
    for name in pool.weights:
        part = 0.0
        for m in MEMBERS:
            fisher = files[m].read(pool.members[m].names[name]).double()
            part = part + ALPHA[m] * COUNTS[m] * fisher * (weights[name].double() - pool.member_weight(m, name))
        square += float(part.square().sum())
    found = quadratic_mismatch(material, weights.__getitem__, ALPHA)
    assert found.total == pytest.approx(square**0.5, rel=1e-9)
    assert set(found.members) == set(MEMBERS)
    assert quadratic_mismatch(material, lambda name: pool.member_weight("two", name), {"two": 1.0}).total == 0.0


def test_what_is_missing_is_named(opened):
    pool, tasks = opened
    weights = merged(pool, member_recipe("one"))
    with pytest.raises(MethodError, match="'two' has no train examples"):
        gradient_mismatch(pool, {"one": tasks["one"]}, weights, ALPHA)
    with pytest.raises(MethodError, match="needs the statistic 'fisher' of one, two"):
        quadratic_mismatch(Material(pool), weights.__getitem__, ALPHA)
