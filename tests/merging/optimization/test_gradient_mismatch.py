import pytest
import torch
from torch.nn.functional import log_softmax

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.optimization.gradient_mismatch import gradient_mismatch, quadratic_mismatch
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.statistics import STATISTICS, LikelihoodSettings, measure, save
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors
from merging.tasks import TextClassificationSettings, make_task

MEMBERS = ("one", "two")
ALPHA = {"one": 0.5, "two": 1.5}
COUNTS = {"one": 24, "two": 10, "base": 7}
RECIPE = Recipe("task_arithmetic", ALPHA)


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
    result = gradient_mismatch(Material(pool, {}, COUNTS), tasks, weights, RECIPE, batch_size=7)
    assert result.total == pytest.approx(sum(float(v.square().sum()) for v in total.values()) ** 0.5, rel=1e-3)
    assert result.members == pytest.approx(own_norms, rel=1e-3)
    assert result.total > 1e-3


def test_a_member_has_none_at_its_own_weights(opened):
    pool, tasks = opened
    alone = Recipe("task_arithmetic", {"two": 1.0})
    result = gradient_mismatch(Material(pool), tasks, merged(pool, member_recipe("two")), alone)
    other = gradient_mismatch(Material(pool), tasks, merged(pool, member_recipe("one")), alone)
    assert result.total < 1e-5 < other.total


@pytest.fixture(scope="module")
def files(opened, tmp_path_factory):
    """Every member's Fisher, and one of the base."""
    pool, tasks = opened
    place = tmp_path_factory.mktemp("fishers")
    statistic = STATISTICS["fisher"](LikelihoodSettings(examples=8))
    result = {
        m: save(
            str(place / m),
            statistic,
            measure(tasks[m], statistic),
            checkpoint=pool.members[m].checkpoint.fingerprint,
            data="d",
        )
        for m in MEMBERS
    }
    g = torch.Generator().manual_seed(0)
    base = {name: torch.rand(tuple(info.shape), generator=g) for name, info in pool.weights.items()}
    about = Partial(counts={"examples": 7})
    result["base"] = save_tensors(
        str(place / "base"), "fisher", {}, base, about, checkpoint=pool.base.fingerprint, data="d"
    )
    return result


GROUPED = {"one@layers:0": 0.5, "one@*": 0.2, "two": 1.5}


@pytest.mark.parametrize(
    ("recipe", "prior"),
    [
        (RECIPE, lambda fisher: 1.0),
        (Recipe("task_arithmetic", GROUPED), lambda fisher: 1.0),
        (Recipe("gradient_matching", ALPHA), lambda fisher: 1.0),
        (Recipe("gradient_matching", ALPHA, {"delta": 0.25}), lambda fisher: 0.25),
        (Recipe("gradient_matching", ALPHA, {"delta": 0.0}), lambda fisher: 1.0),
        (Recipe("gradient_matching", ALPHA, {"base_curvature": "fisher", "delta": 0.5}), lambda f: 0.5 + 7 * f),
        (
            Recipe("lines+gradient_matching", GROUPED, {"base_curvature": "fisher", "delta": 0.5}),
            lambda f: 0.5 + 7 * f,
        ),
    ],
)
def test_the_recipe_s_own_factors_examples_and_base_curvature_count(recipe, prior, opened, files):
    pool, tasks = opened
    material = Material(pool, {"fisher": files}, COUNTS)
    recipe = material.check(recipe)
    weights = merged(pool, METHODS["average"].default_recipe(MEMBERS))
    plain = gradient_mismatch(Material(pool, {}, COUNTS), tasks, weights, RECIPE)
    result = gradient_mismatch(material, tasks, weights, recipe)
    assert (result.total == pytest.approx(plain.total, rel=1e-5)) == (recipe.scaling == ALPHA and prior(1e9) == 1.0)
    square = 0.0
    for name in pool.weights:
        part = 0.0
        for m in MEMBERS:
            fisher = files[m].read(pool.members[m].names[name]).double()
            first = "layer.0" in name or "embeddings" in name
            alpha = recipe.scaling.get(m, recipe.scaling.get("one@layers:0" if first else "one@*"))
            part = part + alpha * COUNTS[m] * fisher * (weights[name].double() - pool.member_weight(m, name))
        square += float((part / prior(files["base"].read(name).double())).square().sum())
    assert quadratic_mismatch(material, weights.__getitem__, recipe).total == pytest.approx(square**0.5, rel=1e-9)


def test_references_have_the_terms_of_all_members(opened):
    pool, tasks = opened
    weights = merged(pool, base_recipe())
    material = Material(pool, {}, COUNTS)
    result = gradient_mismatch(material, tasks, weights, base_recipe())
    same = gradient_mismatch(material, tasks, weights, Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 1.0)))
    assert result == same


def test_a_prior_that_is_partly_nothing_is_refused(opened, files):
    pool, _ = opened
    material = Material(pool, {"fisher": files}, COUNTS)
    recipe = material.check(Recipe("gradient_matching", ALPHA, {"base_curvature": "fisher", "delta": 0.0}))
    with pytest.raises(MethodError, match="a delta above 0"):
        quadratic_mismatch(material, pool.base_weight, recipe)


def test_the_stand_in_is_its_formula(opened, files):
    pool, _ = opened
    material = Material(pool, {"fisher": files}, COUNTS)
    weights = merged(pool, METHODS["average"].default_recipe(MEMBERS))
    square = 0.0
    for name in pool.weights:
        part = 0.0
        for m in MEMBERS:
            fisher = files[m].read(pool.members[m].names[name]).double()
            part = part + ALPHA[m] * COUNTS[m] * fisher * (weights[name].double() - pool.member_weight(m, name))
        square += float(part.square().sum())
    result = quadratic_mismatch(material, weights.__getitem__, RECIPE)
    assert result.total == pytest.approx(square**0.5, rel=1e-9)
    assert set(result.members) == set(MEMBERS)
    alone = Recipe("task_arithmetic", {"two": 1.0})
    assert quadratic_mismatch(material, lambda name: pool.member_weight("two", name), alone).total == 0.0


def test_what_is_missing_is_named(opened):
    pool, tasks = opened
    weights = merged(pool, member_recipe("one"))
    with pytest.raises(MethodError, match="'two' has no train examples"):
        gradient_mismatch(Material(pool), {"one": tasks["one"]}, weights, RECIPE)
    with pytest.raises(MethodError, match="needs the statistic 'fisher' of one, two"):
        quadratic_mismatch(Material(pool), weights.__getitem__, RECIPE)
