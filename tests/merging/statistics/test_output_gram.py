import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merging.statistics import Fisher, LikelihoodSettings, OutputGram, OutputGramSettings, measure
from merging.statistics.capture.layers import layer_names
from merging.tasks.task import IGNORED, Task
from merging.testing.reference import rows_written


def output_gram(estimator: str = "exact", batch_size: int = 3, **options: int) -> OutputGram:
    return OutputGram(OutputGramSettings(estimator=estimator, batch_size=batch_size, **options))


def by_loop(task: Task, estimator: str) -> dict[str, Tensor]:
    """Σ p g gᵀ over single examples (nothing is padding), classes and tokens, divided by the tokens."""
    model = task.load_model()
    layers = layer_names(model)
    sums = {name: torch.zeros(1, dtype=torch.float64) for name in layers.values()}
    rows = dict.fromkeys(layers.values(), 0)
    for position in range(task.size("train")):
        outputs: list[tuple[nn.Module, str, Tensor]] = []
        handles = [
            layer.register_forward_hook(lambda own, args, out, name=name, into=outputs: into.append((own, name, out)))
            for layer, name in layers.items()
        ]
        (batch,) = task.batches("train", position, position + 1, 1)
        logs = task.logits(model, batch).log_softmax(-1)
        for handle in handles:
            handle.remove()
        if estimator == "exact":
            terms = [(float(logs[0, c].detach().exp()), logs[0, c]) for c in range(logs.shape[-1])]
        else:
            nothing = {"ignore_index": IGNORED, "reduction": "sum"}
            terms = [(1.0, -F.nll_loss(logs.flatten(0, -2), batch.labels.flatten(), **nothing))]
        for number, (weight, log) in enumerate(terms):
            result = torch.autograd.grad(log, [out for _, _, out in outputs], retain_graph=True)
            for (layer, name, _), gradient in zip(outputs, result, strict=True):
                for row in rows_written(layer, gradient)[:, 0]:
                    sums[name] = sums[name] + weight * torch.outer(row, row)
                    rows[name] += number == 0
    return {name: value / rows[name] for name, value in sums.items()}


@pytest.mark.parametrize(
    ("name", "estimator"), [("bert", "exact"), ("vit", "empirical"), ("gpt2", "empirical"), ("t5", "empirical")]
)
def test_is_the_definition(build, name, estimator):
    task = build(name, 4)
    result = output_gram().finalize(measure(task, output_gram(estimator)))
    expected = by_loop(task, estimator)
    assert result.keys() == expected.keys()
    for weight, value in expected.items():
        torch.testing.assert_close(
            result[weight].double(), value, rtol=1e-5, atol=1e-5 * max(1e-6, float(value.abs().max()))
        )


@pytest.mark.parametrize(("name", "estimator"), [("bert", "exact"), ("gpt2", "sampled"), ("t5", "sampled")])
def test_sharded_is_serial_whatever_the_batch_size(build, sharded, name, estimator):
    task = build(name)
    serial = measure(task, output_gram(estimator, batch_size=7))
    parts = sharded(task, output_gram(estimator, batch_size=2))
    assert parts.counts == serial.counts
    for weight, value in serial.sums.items():
        torch.testing.assert_close(parts.sums[weight], value, rtol=1e-6, atol=1e-9)


def test_agrees_with_the_fisher_of_a_bias(tiny_task):
    """With one position an example, the diagonal of B is the bias's Fisher."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    task = tiny_task(model, {"input": torch.randn(6, 3, dtype=torch.float64)}, torch.zeros(6, dtype=torch.int64))
    result = output_gram().finalize(measure(task, output_gram()))
    fisher = Fisher(LikelihoodSettings())
    bias = fisher.finalize(measure(task, fisher))
    torch.testing.assert_close(result["0.weight"].diagonal(), bias["0.bias"])
    torch.testing.assert_close(result["2.weight"].diagonal(), bias["2.bias"])


def test_wide_outputs_are_left_out(build):
    partial = measure(build("bert"), output_gram(largest=20))
    assert "bert.encoder.layer.0.intermediate.dense.weight" not in partial.sums
    assert partial.sums["bert.encoder.layer.0.output.dense.weight"].shape == (16, 16)


def test_conv1d_is_transposed(build):
    partial = measure(build("gpt2"), output_gram("empirical"))
    assert partial.sums["transformer.h.0.attn.c_attn.weight"].shape == (48, 48)
    assert "transformer.h.0.attn.c_attn.weight" in partial.transposed


def test_the_model_is_left_as_it_was(build):
    task = build("t5")
    model = task.load_model()
    output_gram("empirical").measure(model, task, task.batches("train", 0, 4, 2))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.decoder.config.use_cache


def test_key_names_what_the_numbers_depend_on():
    assert output_gram(largest=5).key() != output_gram().key()
    assert output_gram(batch_size=5).key() == output_gram().key()
