import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForSequenceClassification

from merging.checkpoints.models.parameter_names import checkpoint_names
from merging.errors import StatisticsError
from merging.statistics import Fisher, LikelihoodSettings, Partial, measure
from merging.tasks.head import load_model
from merging.tasks.task import IGNORED, Batch, Task


def fisher(estimator: str = "exact", batch_size: int = 3, **options: int) -> Fisher:
    return Fisher(LikelihoodSettings(estimator=estimator, batch_size=batch_size, **options))


def single(task: Task, model: nn.Module, position: int) -> tuple[Batch, Tensor]:
    """One example with its logits."""
    (batch,) = task.batches("train", position, position + 1, 1)
    return batch, task.logits(model, batch)


def by_loop(task: Task, estimator: str) -> dict[str, Tensor]:
    """The Fisher's sum from its definition: one example after another, one class after another, plain autograd."""
    model = task.load_model()
    parameters, names = list(model.parameters()), checkpoint_names(model)
    sums = {names[id(p)]: torch.zeros_like(p) for p in parameters}
    for position in range(task.size("train")):
        batch, logits = single(task, model, position)
        logs = logits.log_softmax(-1)
        if estimator == "exact":
            terms = [(float(logs[0, c].detach().exp()), logs[0, c]) for c in range(logs.shape[-1])]
        else:
            nothing = {"ignore_index": IGNORED, "reduction": "sum"}
            terms = [(1.0, -F.nll_loss(logs.flatten(0, -2), batch.labels.flatten(), **nothing))]
        for weight, log in terms:
            result = torch.autograd.grad(log, parameters, retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(parameters, result, strict=True):
                if gradient is not None:
                    sums[names[id(parameter)]] += weight * gradient.square()
    return sums


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Equal to rounding: relative to each tensor's largest entry, or (a key's bias has no gradient) to the model's."""
    assert result.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(value.max()), 1e-9 * largest)
        assert float((result[name] - value).abs().max()) <= tolerance * scale, name


# Llama's normalisation computes in float32, whatever the weights.
@pytest.mark.parametrize(("name", "tolerance"), [("bert", 1e-9), ("vit", 1e-9), ("llama", 1e-5)])
def test_exact_is_the_definition(build, name, tolerance):
    task = build(name)
    assert_same(measure(task, fisher()).sums, by_loop(task, "exact"), tolerance)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("bert", 1e-9), ("vit", 1e-9), ("llama", 1e-5), ("gpt2", 1e-9), ("t5", 1e-9)]
)
def test_empirical_is_the_definition(build, name, tolerance):
    task = build(name)
    assert_same(measure(task, fisher("empirical")).sums, by_loop(task, "empirical"), tolerance)


@pytest.mark.parametrize(("name", "estimator"), [("bert", "exact"), ("gpt2", "sampled"), ("t5", "sampled")])
def test_sharded_is_serial_whatever_the_batch_size(build, sharded, name, estimator):
    task = build(name)
    serial = measure(task, fisher(estimator, batch_size=7))
    parts = sharded(task, fisher(estimator, batch_size=2))
    assert parts.counts == serial.counts
    assert_same(parts.sums, serial.sums)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_padding_changes_nothing(build, name):
    task = build(name, 5)
    before = measure(task, fisher("empirical", batch_size=5))
    width = task.mask.shape[1]
    for position in range(5):
        short = int(task.mask[position].sum())
        task.inputs["input_ids"][position, short:] = 3
    task.batches = lambda split, start, stop, size: iter([Batch(task.inputs, task.labels, torch.arange(5), task.mask)])
    after = measure(task, fisher("empirical"))
    assert width > int(task.mask.sum(1).min())
    assert_same(after.sums, before.sums)


def test_logistic_regression_by_hand(tiny_task):
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]], dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    p = (x @ model.weight.detach().T + model.bias.detach()).softmax(-1)
    # ∂ log p_c / ∂ W_k = (δ_ck − p_k) x, so Σ_c p_c (δ_ck − p_k)² = p_k (1 − p_k).
    variance = p * (1 - p)
    task = tiny_task(model, {"input": x}, torch.zeros(2, dtype=torch.int64))
    result = fisher().finalize(measure(task, fisher()))
    torch.testing.assert_close(result["weight"], (variance.T @ x.square() / 2).float())
    torch.testing.assert_close(result["bias"], variance.mean(0).float())


def test_sampled_converges_to_exact(tiny_task):
    torch.manual_seed(0)
    x = torch.randn(1, 4, dtype=torch.float64).expand(20_000, 4)
    task = tiny_task(nn.Linear(4, 5).double(), {"input": x}, torch.zeros(20_000, dtype=torch.int64))
    many = {"batch_size": 4000, "examples": 20_000}
    exact = fisher().finalize(measure(task, fisher("exact", **many)))["weight"]
    sampled = fisher().finalize(measure(task, fisher("sampled", **many)))["weight"]
    assert float((sampled / exact - 1).abs().max()) < 0.05


def test_sampled_follows_its_seed_only(build):
    task = build("bert")
    first, second, other = (measure(task, fisher("sampled", seed=seed)).sums for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.allclose(first[name], other[name]) for name in first)


def test_a_saturated_model_has_a_small_finite_fisher(tiny_task):
    model = nn.Linear(2, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[40.0, 0.0], [0.0, 0.0], [-40.0, 0.0]]))
        model.bias.zero_()
    task = tiny_task(model, {"input": torch.ones(1, 2, dtype=torch.float64)}, torch.zeros(1, dtype=torch.int64))
    sums = measure(task, fisher()).sums
    expected = by_loop(task, "exact")
    torch.testing.assert_close(sums["weight"], expected["weight"], rtol=1e-6, atol=0)
    assert 0 < float(sums["weight"].max()) < 1e-15


class TwiceUsed(nn.Module):
    """A layer used twice, a table tied to the output, a parameter without a layer, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.mixing = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.grouped = nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=2)
        self.plain = nn.Conv2d(6, 6, (1, 3), padding=(0, 1), stride=(1, 2))
        self.norm = nn.RMSNorm(6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight
        self.idle = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.mixing(self.table(ids)).tanh()
        states = self.mixing(states * self.scale)
        image = self.plain(self.grouped(states.transpose(1, 2)[:, :, None]).tanh())
        states = self.norm(image[:, :, 0].transpose(1, 2))
        return self.out(states.mean(1) + self.table(ids[:, :1]).squeeze(1))


def test_layers_used_twice_tied_weights_and_any_module(tiny_task):
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (5, 4))
    task = tiny_task(TwiceUsed().double(), {"ids": ids}, torch.zeros(5, dtype=torch.int64))
    result = measure(task, fisher(batch_size=4)).sums
    assert_same(result, by_loop(task, "exact"))
    assert not result["idle.weight"].any()
    assert result["scale"].all()


class Branching(nn.Module):
    """Looks into its input, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([2.0, 0.5, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain if float(x.detach().abs().max()) < 100 else x.clamp(-100, 100)


class Inplace(nn.Module):
    """Changes a layer's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(3, 3), Branching(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.branch(self.first(x).relu_()))


def test_in_place_changes_and_branches_on_values(tiny_task):
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    task = tiny_task(Inplace().double(), {"x": x}, torch.zeros(6, dtype=torch.int64))
    assert_same(measure(task, fisher(batch_size=6)).sums, by_loop(task, "exact"))


def test_the_model_is_left_as_it_was(build):
    task = build("t5")
    model = task.load_model()
    model.shared.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    caching = model.config.use_cache, model.decoder.config.use_cache
    fisher("empirical").measure(model, task, task.batches("train", 0, 3, 3))
    assert not model.shared.weight.requires_grad
    assert model.lm_head.weight.requires_grad == model.shared.weight.requires_grad
    assert model.decoder.block[0].layer[0].SelfAttention.q.weight.requires_grad
    assert (model.config.use_cache, model.decoder.config.use_cache) == caching
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_float32_agrees_with_float64(build, tiny_task):
    task = build("bert")
    single_precision = tiny_task(task.load_model().float(), task.inputs, task.labels, task.mask)
    result = measure(single_precision, fisher()).sums
    assert result["classifier.weight"].dtype == torch.float32
    assert_same({name: value.double() for name, value in result.items()}, by_loop(task, "exact"), 1e-4)


def test_exact_is_refused_for_sequences(build):
    with pytest.raises(StatisticsError, match="sampled, or empirical"):
        measure(build("gpt2"), fisher("exact"))


def test_empirical_names_the_example_without_a_label(build):
    task = build("bert")
    task.labels[4] = IGNORED
    with pytest.raises(StatisticsError, match="example 4 has no label"):
        measure(task, fisher("empirical"))
    assert measure(task, fisher("exact")).counts["examples"] == 7


def test_one_class_and_mismatched_labels_are_refused(tiny_task):
    x = torch.ones(2, 3)
    with pytest.raises(StatisticsError, match="one class"):
        measure(tiny_task(nn.Linear(3, 1), {"input": x}, torch.zeros(2, dtype=torch.int64)), fisher())
    with pytest.raises(StatisticsError, match="must agree"):
        measure(tiny_task(nn.Linear(3, 2), {"input": x}, torch.zeros(2, 3, dtype=torch.int64)), fisher())


def test_a_layer_that_hides_its_examples_is_measured_one_by_one(tiny_task):
    class Bypassing(tiny_task):
        def logits(self, model: nn.Module, batch: Batch) -> Tensor:
            return model.layer(batch.inputs["x"][None])[0]

    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(3, 2)}).double()
    task = Bypassing(model, {"x": torch.randn(4, 3, dtype=torch.float64)}, torch.zeros(4, dtype=torch.int64))
    assert_same(measure(task, fisher()).sums, by_loop(task, "exact"))


class ReadTwice(nn.Module):
    """A table that its parent also reads, as the head of a tied model does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(11, 5), nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.layer(self.table(ids).mean(1)).tanh()
        return (states + states @ self.layer.weight) @ self.table.weight[:3].T


@pytest.mark.parametrize("size", [1, 4, 6])
def test_weights_that_are_also_read_outside_of_their_module(tiny_task, size):
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (6, 4))
    task = tiny_task(ReadTwice().double(), {"ids": ids}, torch.zeros(6, dtype=torch.int64))
    assert_same(measure(task, fisher(batch_size=size)).sums, by_loop(task, "exact"))


class Mixing(nn.Module):
    """Every example's logits depend on the others in its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(x).mean(0)


def test_examples_that_mix_in_a_batch_are_measured_one_by_one(tiny_task):
    torch.manual_seed(0)
    task = tiny_task(
        Mixing().double(), {"x": torch.randn(5, 3, dtype=torch.float64)}, torch.zeros(5, dtype=torch.int64)
    )
    assert_same(measure(task, fisher(batch_size=5)).sums, by_loop(task, "exact"))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("estimator", ["exact", "empirical", "sampled"])
def test_several_labels_and_regressions_have_their_own_likelihood(build, problem, estimator):
    task = build("bert", 5)
    task.model.config.problem_type = problem
    generator = torch.Generator().manual_seed(3)
    task.labels = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    binary = problem.startswith("multi")
    if binary:
        task.labels = (task.labels > 0).double()
    model = task.load_model()
    parameters, names = list(model.parameters()), checkpoint_names(model)
    expected = {names[id(p)]: torch.zeros_like(p) for p in parameters}
    for position in range(5):
        _, logits = single(task, model, position)
        z = logits[0]
        chance = z.detach().sigmoid()
        if estimator == "exact" and binary:
            # every combination of labels by its probability
            terms = []
            for label in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3):
                weight = float(torch.where(label > 0, chance, 1 - chance).prod())
                terms.append((weight, -F.binary_cross_entropy_with_logits(z, label, reduction="sum")))
        elif estimator == "exact":
            terms = [(1.0, value) for value in z]
        else:
            label = task.labels[position]
            if estimator == "sampled":
                draws = np.random.default_rng((0, position))
                drawn = torch.from_numpy(draws.random(3) if binary else draws.standard_normal(3))
                label = (drawn < chance).double() if binary else z.detach() + drawn
            log = -F.binary_cross_entropy_with_logits(z, label, reduction="sum")
            terms = [(1.0, log if binary else -(z - label).square().sum() / 2)]
        for weight, log in terms:
            result = torch.autograd.grad(log, parameters, retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(parameters, result, strict=True):
                if gradient is not None:
                    expected[names[id(parameter)]] += weight * gradient.square()
    assert_same(measure(task, fisher(estimator)).sums, expected)


def test_class_indices_are_no_labels_of_a_multi_label_head(build):
    task = build("bert")
    task.model.config.problem_type = "multi_label_classification"
    with pytest.raises(StatisticsError, match="needs a label for each of several outputs"):
        measure(task, fisher("empirical"))


def test_finalize_is_a_float32_mean_and_names_what_is_not_finite():
    partial = Partial({"w": torch.tensor([2.0, 6.0], dtype=torch.float64)}, {"examples": 4, "tokens": 9})
    mean = fisher().finalize(partial)["w"]
    assert mean.dtype == torch.float32
    assert mean.tolist() == [0.5, 1.5]
    partial.sums["w"][1] = torch.inf
    with pytest.raises(StatisticsError, match="'w' holds NaN or Inf"):
        fisher().finalize(partial)
    with pytest.raises(StatisticsError, match="no examples"):
        fisher().finalize(Partial())


def test_no_batches_give_a_neutral_partial(build):
    task = build("bert")
    empty = fisher().measure(task.load_model(), task, [])
    full = measure(task, fisher())
    assert empty.combine(full) is full


def test_key_has_the_seed_only_where_something_is_drawn():
    assert "seed" not in fisher("exact").key()
    assert fisher("sampled", seed=3).key()["seed"] == 3
    assert fisher("exact", batch_size=1).key() == fisher("exact", batch_size=2).key()
    assert fisher("exact").key() != fisher("empirical").key()


@pytest.mark.parametrize("bare", [False, True])
def test_experts_have_the_names_of_their_checkpoint(tmp_path, tiny_task, bare):
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    MixtralForSequenceClassification(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if bare:
        names = {name: name.removeprefix("model.") for name in load_file(file)}
        save_file({names[n]: value.clone() for n, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model = load_model(str(tmp_path), "AutoModelForSequenceClassification")
    ids = torch.randint(1, 40, (5, 6), generator=torch.Generator().manual_seed(1))
    task = tiny_task(model, {"input_ids": ids}, ids[:, 0] % 3)
    result = measure(task, fisher())
    assert {n: v.shape for n, v in result.sums.items()} == {n: v.shape for n, v in load_file(file).items()}
    # by_loop knows no experts: it sums squares of the model's own parameters
    expected = by_loop(task, "exact")
    for layer in range(2):
        prefix = f"{'' if bare else 'model.'}layers.{layer}"
        up = expected[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = expected[f"model.layers.{layer}.mlp.experts.down_proj"]
        for expert in range(4):
            here = f"{prefix}.block_sparse_moe.experts.{expert}"
            parts = {"w1": up[expert, :12], "w3": up[expert, 12:], "w2": down[expert]}
            for name, value in parts.items():
                torch.testing.assert_close(result.sums[f"{here}.{name}.weight"], value, rtol=1e-3, atol=1e-7)
