import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from merging.checkpoints.pool import Pool
from merging.errors import TaskError
from merging.evaluation.ensemble import Ensemble, mean_logits, measure_ensemble
from merging.evaluation.live_models import LiveModels
from merging.mergers.material import Material
from merging.recipe import member_recipe
from merging.tasks import CausalLMSettings, make_task

CPU = torch.device("cpu")
ALL = ("one", "two", "three")


def test_one_member_is_itself(tiny_material):
    live = LiveModels(tiny_material.material, tiny_material.tasks, tiny_material.owners, CPU)
    alone = live.measure(member_recipe("two"), "validation").scores
    for mean in ("probabilities", "logits"):
        result = measure_ensemble(
            tiny_material.material, tiny_material.tasks, tiny_material.owners, ["two"], "validation", CPU, mean=mean
        )
        for task, (score, _) in result.items():
            assert score.value == alone[task].value
            assert score.loss == pytest.approx(alone[task].loss, rel=1e-6)


def test_is_the_mean_of_what_transformers_says(tiny_material, tiny_pool):
    """Backbones of all members, each with the head of the task's owner; probabilities averaged in float64."""
    task = tiny_material.tasks[2]
    measured, predictions = measure_ensemble(
        tiny_material.material, [task], tiny_material.owners, ALL, "validation", CPU
    )[task.name]
    head = AutoModelForSequenceClassification.from_pretrained(tiny_pool[task.name]).eval().double()
    (batch,) = task.batches("validation", 0, task.size("validation"), 1000)
    chances = []
    for member in ALL:
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_pool[member], num_labels=3, ignore_mismatched_sizes=True
        )
        model = model.eval().double()
        model.classifier.load_state_dict(head.classifier.state_dict())
        with torch.no_grad():
            chances.append(model(**batch.inputs).logits.softmax(-1))
    mean = torch.stack(chances).mean(0)
    true = mean.gather(1, batch.labels[:, None])[:, 0]
    assert predictions is not None
    np.testing.assert_allclose(np.exp(-predictions.losses), true.numpy(), rtol=1e-5)
    assert measured.value == pytest.approx(float((mean.argmax(1) == batch.labels).double().mean()))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_means_of_every_likelihood(likelihood):
    g = torch.Generator().manual_seed(0)
    each = [5 * torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(5)]
    apply = {"categorical": lambda x: x.softmax(-1), "bernoulli": torch.sigmoid, "gaussian": lambda x: x}[likelihood]
    wanted = torch.stack([apply(value) for value in each]).mean(0)
    torch.testing.assert_close(apply(mean_logits(each, likelihood, "probabilities")), wanted)
    torch.testing.assert_close(mean_logits(each, likelihood, "logits"), torch.stack(each).mean(0))


def test_language_models(tokenizer, tmp_path):
    """Members' likelihoods of completions, averaged token by token."""
    prompts, completions = ["good film", "so", "the plot was not"], ["bad", "very good book", "fine"]
    pd.DataFrame({"prompt": prompts, "completion": completions}).to_parquet(tmp_path / "v.parquet")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    task = make_task("t", CausalLMSettings(data={"validation": str(tmp_path / "v.parquet")}), str(tmp_path / "a"))
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in "ab"})
    (score, predictions) = measure_ensemble(Material(pool), [task], {"t": "a"}, "ab", "validation", CPU)["t"]
    (batch,) = task.batches("validation", 0, 3, 3)
    models = [LlamaForCausalLM.from_pretrained(tmp_path / name).eval() for name in "ab"]
    with torch.no_grad():
        mean = torch.stack([task.logits(model, batch).softmax(-1) for model in models]).mean(0)
    means = []
    for row, labels in zip(mean, batch.labels, strict=True):
        means.append(float(row[labels >= 0].gather(1, labels[labels >= 0, None]).log().mean()))
    assert predictions is not None
    np.testing.assert_allclose(predictions.values, means, rtol=1e-5)
    assert score.value == pytest.approx(np.mean(means), rel=1e-5)
    with pytest.raises(TaskError, match="ensemble"):
        Ensemble(models, "categorical").generate()
