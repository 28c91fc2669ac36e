import numpy as np
import pytest
import torch

from merging.mergers.resident import ResidentMerger
from merging.optimization import distiller
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.distiller import Distiller
from merging.optimization.losses import SharedModels
from merging.recipe import Recipe

CPU = torch.device("cpu")
FAR = Recipe("task_arithmetic", dict.fromkeys(("one", "three", "two"), 5.0))
BRIEF = DistillationSettings(steps=6, batch=9, learning_rate=1e-3, evaluations=3, held_out=0.2)


def reference_gradient(tiny, made, step, settings):
    """By autograd in float64, example by example, over the whole step at once."""
    models = SharedModels(tiny.material.pool, tiny.tasks, tiny.owners, CPU)
    ResidentMerger(tiny.material, models.weights).merge(tiny.material.check(FAR))
    counts = [len(places) for places in made.schedule._places]
    factors = np.array([settings.weights.get(tiny.owners[task.name], 1.0) for task in tiny.tasks])
    units = made.schedule.step(step)
    total = torch.zeros((), dtype=torch.float64)
    for task, model, places, count, factor in zip(tiny.tasks, models.models, units, counts, factors, strict=True):
        temperature = settings.temperatures.get(tiny.owners[task.name], settings.temperature)
        teacher, model = task.load_model().double(), model.double().requires_grad_(True)
        share = factor / factors.sum() * sum(counts) / count / sum(len(places) for places in units)
        for place in places:
            batch = task.batch("train", np.array([place]))
            own, other = (task.logits(one, batch)[0] / temperature for one in (model, teacher))
            p, log_q = other.detach().softmax(0), own.log_softmax(0)
            total = total + share * temperature**2 * (p * (p.log() - log_q)).sum()
            if settings.hidden:
                h, t = (task.representation(one, batch)[0] for one in (model, teacher))
                total = total + share * settings.hidden * (h - t).square().sum() / t.square().sum().detach()
    total.backward()
    result = {}
    for task, model in zip(tiny.tasks, models.models, strict=True):
        names = tiny.material.pool.members[tiny.owners[task.name]].names
        parameters = dict(model.named_parameters())
        for name in tiny.material.pool.weights:
            gradient = parameters[names[name]].grad
            if gradient is not None:
                result[name] = result.get(name, 0) + gradient
    return float(total.detach()), result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 2.0, "temperatures": {"two": 0.5}, "weights": {"one": 3.0}},
        {"hidden": 0.7, "at_once": 2, "parts": 3},
    ],
)
def test_the_loss_and_its_gradient_are_those_of_single_examples_in_float64(tiny_material, tmp_path, changes):
    settings = BRIEF.model_copy(update=changes)
    tiny = tiny_material
    made = Distiller(tiny.material, tiny.tasks, tiny.owners, FAR, settings, CPU, str(tmp_path))
    wanted, gradients = reference_gradient(tiny, made, 1, settings)
    parts = [made.gradient(1, part) for part in range(settings.parts)]
    assert sum(part.loss for part in parts) == pytest.approx(wanted, rel=5e-3)
    for name, gradient in gradients.items():
        result = sum(part.gradients[name].double() for part in parts if name in part.gradients)
        torch.testing.assert_close(result, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-9)


def test_steps_follow_the_inputs_where_none_are_named(tiny_material, tmp_path):
    tiny = tiny_material
    settings = DistillationSettings(batch=8)
    made = Distiller(tiny.material, tiny.tasks, tiny.owners, FAR, settings, CPU, str(tmp_path))
    assert made.steps == distiller.PASSES * made.schedule.steps_a_pass == 10 * round(66 / 8)
