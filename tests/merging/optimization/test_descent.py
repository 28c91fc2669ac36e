import pytest
import torch

from merging.errors import MethodError
from merging.evaluation.live_models import LiveModels
from merging.mergers.resident import ResidentMerger
from merging.optimization.descent import DescentSettings, descend
from merging.optimization.distillation import distil
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.losses import Endless, GradientModels
from merging.recipe import Recipe

MEMBERS = ("one", "three", "two")
CPU = torch.device("cpu")
START = Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 0.3))


def whole_loss(tiny, recipe, loss):
    models = GradientModels(tiny.material.pool, tiny.tasks, tiny.owners, loss, CPU)
    ResidentMerger(tiny.material, models.weights).merge(tiny.material.check(recipe))
    split = "train" if loss == "distil" else "validation"
    return models.gradients([next(Endless(task, split, task.size(split))) for task in tiny.tasks])


def test_losses_are_what_an_evaluation_says(tiny_material):
    live = LiveModels(tiny_material.material, tiny_material.tasks, tiny_material.owners, CPU)
    scores = live.measure(START, "validation").scores.values()
    for loss, wanted in {
        "expected_error": sum(score.expected_error for score in scores) / 3,
        "cross_entropy": sum(score.loss for score in scores) / 3,
    }.items():
        assert whole_loss(tiny_material, START, loss)[0] == pytest.approx(wanted, rel=1e-5)


def test_a_member_has_nothing_to_distil_from_itself(tiny_material):
    models = GradientModels(tiny_material.material.pool, tiny_material.tasks[:1], {"one": "one"}, "distil", CPU)
    ResidentMerger(tiny_material.material, models.weights).merge(Recipe("member", {"one": 1.0}))
    loss, _ = models.gradients([next(Endless(tiny_material.tasks[0], "train", 24))])
    assert loss == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("key", ["one", "two@layers:1-", "two@layers:0"])
@pytest.mark.parametrize("loss", ["expected_error", "distil"])
def test_a_step_goes_down_the_slope_that_differences_show(tiny_material, key, loss):
    """The first step of Adam has the sign of the derivative: compared with a central difference over whole splits."""
    scaling = {"one": 0.3, "three": 0.3, "two@layers:0": 0.3, "two@layers:1-": 0.3}
    start = Recipe("task_arithmetic", scaling)
    settings = DescentSettings(loss=loss, steps=1, batch=30, learning_rate=0.01, waypoints=1)
    (point,) = descend(tiny_material.material, tiny_material.tasks, tiny_material.owners, start, settings, CPU)
    assert point.examples == 3 * (24 if loss == "distil" else 30)
    up, down = ({**scaling, key: 0.3 + step} for step in (0.02, -0.02))
    slope = whole_loss(tiny_material, Recipe("task_arithmetic", up), loss)[0]
    slope -= whole_loss(tiny_material, Recipe("task_arithmetic", down), loss)[0]
    assert (point.recipe.scaling[key] - 0.3) * slope < 0


def test_descent_lowers_the_loss_and_says_what_it_cost(tiny_material):
    settings = DescentSettings(loss="cross_entropy", steps=12, batch=10, waypoints=3)
    points = descend(tiny_material.material, tiny_material.tasks, tiny_material.owners, START, settings, CPU)
    assert [point.examples for point in points] == [120, 240, 360]
    before, after = (whole_loss(tiny_material, r, "cross_entropy")[0] for r in (START, points[-1].recipe))
    assert after < before
    again = descend(tiny_material.material, tiny_material.tasks, tiny_material.owners, START, settings, CPU)
    assert [point.recipe.identity for point in again] == [point.recipe.identity for point in points]


def test_only_linear_methods_descend(tiny_material):
    start = Recipe("ties", dict.fromkeys(MEMBERS, 1.0))
    with pytest.raises(MethodError, match="not linear"):
        descend(tiny_material.material, tiny_material.tasks, tiny_material.owners, start, DescentSettings(), CPU)


def test_distillation_brings_outputs_nearer_to_the_members(tiny_material):
    settings = DistillationSettings(steps=15, batch=36, learning_rate=1e-3)
    weights = distil(tiny_material.material, tiny_material.tasks, tiny_material.owners, START, settings, CPU).weights
    before = whole_loss(tiny_material, START, "distil")[0]
    models = GradientModels(tiny_material.material.pool, tiny_material.tasks, tiny_material.owners, "distil", CPU)
    for name, value in models.weights.items():
        value.copy_(weights[name])
    after, _ = models.gradients([next(Endless(task, "train", 24)) for task in tiny_material.tasks])
    assert after < 0.9 * before
