from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from merging.mergers.resident import ResidentMerger
from merging.optimization.losses import GradientModels
from merging.recipe import Recipe


class Positions:
    """A task whose logits are one row for each position of a text: its encoder's outputs."""

    def __init__(self, task):
        self._task, self.name = task, task.name

    def likelihood(self, model):
        return "categorical"

    def load_model(self):
        return self._task.load_model()

    def logits(self, model, batch):
        return model.bert(**batch.inputs).last_hidden_state


def test_distillation_looks_at_target_positions_and_not_at_padding(tiny_material):
    (task,) = (task for task in tiny_material.tasks if task.name == "one")
    losses = GradientModels(
        tiny_material.material.pool, [Positions(task)], {"one": "one"}, "distil", torch.device("cpu")
    )
    ResidentMerger(tiny_material.material, losses.weights).merge(Recipe("average", {"two": 1.0, "three": 1.0}))
    (batch,) = task.batches("train", 0, 8, 8)
    real = batch.inputs["attention_mask"].bool()
    assert not real.all()
    sequences = replace(batch, labels=torch.where(real, 0, -100))
    padded = torch.where(real, batch.inputs["input_ids"], 7)
    other = replace(sequences, inputs={**batch.inputs, "input_ids": padded})
    result, same = (losses.gradients([one])[0] for one in (sequences, other))
    assert result == pytest.approx(same, rel=1e-5)
    with torch.no_grad():
        merged, wanted = (
            Positions(task).logits(model, batch)[real].double() for model in (losses._models[0], task.load_model())
        )
    expected = kl_div(log_softmax(merged, -1), log_softmax(wanted, -1), reduction="batchmean", log_target=True)
    assert result == pytest.approx(float(expected), rel=1e-4)
