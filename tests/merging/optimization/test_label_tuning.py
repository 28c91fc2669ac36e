import pytest
import torch

from merging.evaluation.live_models import LiveModels
from merging.optimization.fine_tuning import TrainingSettings
from merging.optimization.label_tuning import tune
from merging.recipe import Recipe

CPU = torch.device("cpu")
START = Recipe("average", dict.fromkeys(("one", "three", "two"), 1.0))


def test_learns_the_validation_labels_and_leaves_heads_alone(tiny_material):
    tasks, owners = tiny_material.tasks, tiny_material.owners
    before = LiveModels(tiny_material.material, tasks, owners, CPU).measure(START, "validation").scores
    reported = []
    settings = TrainingSettings(epochs=30, learning_rate=1e-2)
    models = tune(
        tiny_material.material, tasks, owners, START, settings, CPU, lambda done, total: reported.append((done, total))
    )
    steps = 30 * -(-max(task.size("validation") for task in tasks) // 16)
    assert reported[-1] == (steps, steps)
    for task, model in zip(tasks, models, strict=True):
        assert task.evaluate(model, "validation").loss < before[task.name].loss - 0.05
        own = task.load_model()
        assert model.classifier.weight.equal(own.classifier.weight)
    shared = {model.bert.encoder.layer[0].output.dense.weight.data_ptr() for model in models}
    assert len(shared) == 1


def test_no_step_leaves_the_merge_as_it_is(tiny_material):
    tasks, owners = tiny_material.tasks, tiny_material.owners
    wanted = LiveModels(tiny_material.material, tasks, owners, CPU).measure(START, "test").scores
    models = tune(tiny_material.material, tasks, owners, START, TrainingSettings(learning_rate=1e-12), CPU)
    for task, model in zip(tasks, models, strict=True):
        assert task.evaluate(model, "test").loss == pytest.approx(wanted[task.name].loss, rel=1e-6)
