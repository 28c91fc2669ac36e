"""Convolutions: Grams, output Grams and Fisher against windows cut one by one, and RegMean on them."""

import pytest
import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from merging.errors import MethodError
from merging.methods import METHODS
from merging.methods.least_squares.blocks import blocks_of
from merging.methods.method import Context, Weight
from merging.recipe import Recipe
from merging.statistics import (
    Fisher,
    Gram,
    LikelihoodSettings,
    OutputGram,
    OutputGramSettings,
    StatisticSettings,
    measure,
)
from merging.statistics.statistics_file import StatisticsFile, save
from merging.testing.reference import brute_force

KINDS = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": (2, 1)},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "stride": (1, 2)},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": "same", "padding_mode": "reflect", "groups": 2},
}


class Net(nn.Module):
    """A convolution of some kind between others, one of which reads the same input through another kernel."""

    def __init__(self, dimensions: int, **settings: object) -> None:
        super().__init__()
        kind = nn.Conv2d if dimensions == 2 else nn.Conv1d
        self.first, self.beside = kind(2, 4, 3, padding=1), kind(2, 4, 1, bias=False)
        self.middle = kind(4, 4, 3, **settings)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle((self.first(x) + self.beside(x)).tanh()).flatten(2).mean(2))


def grams(size: int) -> Gram:
    return Gram(StatisticSettings(batch_size=size))


def outputs(size: int) -> OutputGram:
    return OutputGram(OutputGramSettings(estimator="exact", batch_size=size))


def assert_near(result, expected, tolerance=1e-9):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            result[name].to(value.dtype), value, rtol=tolerance, atol=tolerance * float(value.abs().max())
        )


def spread(partial):
    """Sums under every name, shared or not."""
    return partial.sums | {name: partial.sums[holder] for name, holder in partial.shared.items()}


@pytest.fixture
def make(tiny_task):
    def run(kind, dimensions=2, count=5):
        settings = dict(KINDS[kind])
        if dimensions == 1:
            settings = {key: value[-1] if isinstance(value, tuple) else value for key, value in settings.items()}
        torch.manual_seed(0)
        model = Net(dimensions, **settings).double()
        shape = (7, 6) if dimensions == 2 else (9,)
        x = torch.randn(count, 2, *shape, dtype=torch.float64)
        return tiny_task(model, {"x": x}, torch.arange(count) % 3)

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_statistics_are_their_definitions(make, kind, dimensions):
    task = make(kind, dimensions)
    expected = brute_force(task)
    for size in (2, 5):
        result = measure(task, grams(size))
        assert_near(spread(result), expected.gram)
        assert {name: result.counts[name] for name in result.sums} == {
            name: expected.rows[name] for name in result.sums
        }
        assert_near(measure(task, outputs(size)).sums, expected.output_gram)
        fisher = Fisher(LikelihoodSettings(estimator="exact", batch_size=size))
        assert_near(measure(task, fisher).sums, expected.fisher)
    assert result.shared == {}  # one input, two kernels: each its own rows
    if KINDS[kind].get("groups", 1) > 1:
        groups = KINDS[kind]["groups"]
        extent = 4 // groups * (9 if dimensions == 2 else 3)
        assert result.sums["middle.weight"].shape == (groups, extent, extent)


@pytest.mark.parametrize("kind", ["stride", "groups"])
def test_sharded_is_serial(make, sharded, kind):
    task = make(kind)
    assert_near(sharded(task, grams(2)).sums, measure(task, grams(5)).sums)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_real_architectures(tiny_task, name):
    """Strided and grouped, with BatchNorm and LayerNorm over channels; no convolution is left out."""
    torch.manual_seed(0)
    if name == "resnet":
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config)
    else:
        config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3)
        model = ConvNextForImageClassification(config)
    model = model.double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    task = tiny_task(model, {"pixel_values": images}, torch.arange(3))
    result, expected = measure(task, grams(3)), brute_force(task)
    assert_near(spread(result), expected.gram)
    assert result.uncovered == ()
    fisher = Fisher(LikelihoodSettings(estimator="exact", batch_size=3))
    assert_near(measure(task, fisher).sums, expected.fisher)


def members_of(make, kind):
    """Weights with Grams of two members, and their rows: x and y of every group of the middle convolution."""
    base, result = make(kind).load_model().state_dict(), {}
    for seed, member in enumerate(("a", "b")):
        task = make(kind)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in task.model.parameters():
                value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        task.inputs = {"x": torch.randn(5, 2, 7, 6, generator=generator, dtype=torch.float64)}
        partial = measure(task, grams(5))
        result[member] = task.model.state_dict(), grams(5).finalize(partial)
    weights = []
    for name, value in base.items():
        gram = {member: own[1][name] for member, own in result.items() if name in own[1]}
        weights.append(
            Weight(
                name, value, {member: own[0][name] for member, own in result.items()}, {"gram": gram} if gram else {}
            )
        )
    return weights


def merged(method, weights, parameters=None):
    recipe = METHODS[method].complete(Recipe(method, {"a": 1.0, "b": 1.0}, parameters or {}))
    out = {weight.name: torch.empty_like(weight.base) for weight in weights}
    prepared = METHODS[method].prepare(weights, Context())
    prepared.merge(recipe.scaling, recipe.parameters, out)
    return out, prepared.report()


@pytest.mark.parametrize("kind", ["stride", "groups", "depthwise"])
def test_regmean_solves_convolutions_group_by_group(make, kind):
    weights = members_of(make, kind)
    out, report = merged("regmean", weights)
    for weight in weights:
        if not weight.statistics:
            torch.testing.assert_close(out[weight.name], torch.stack(list(weight.members.values())).mean(0))
            continue
        groups = KINDS[kind].get("groups", 1) if weight.name == "middle.weight" else 1
        for group in range(groups):
            left, right = 0.0, 0.0
            for member, value in weight.members.items():
                gram = weight.statistics["gram"][member].double()
                gram = gram[group] if gram.dim() == 3 else gram
                gram = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
                matrix = value.flatten(1).chunk(groups)[group]
                left, right = left + gram, right + gram @ matrix.T
            expected = torch.linalg.solve(left, right).T
            torch.testing.assert_close(out[weight.name].flatten(1).chunk(groups)[group], expected, rtol=1e-4, atol=1e-5)
    assert "averaged_layers" not in report


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("mats", {"tolerance": 1e-10, "iterations": 500}), ("esm", {}), ("mats", {"subspace": "identity"})],
)
def test_other_methods_that_read_grams(make, method, parameters):
    weights = members_of(make, "groups")
    out, _ = merged(method, weights, parameters)
    assert all(value.isfinite().all() for value in out.values())
    if method == "mats" and "subspace" not in parameters:  # RegMean with ρ = 1
        expected, _ = merged("regmean", weights, {"rho": 1.0})
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value, rtol=1e-3, atol=1e-4)


def test_a_gram_of_another_convolution_is_refused(make):
    (weight,) = (w for w in members_of(make, "groups") if w.name == "middle.weight")
    for shape in ((9, 9), (3, 18, 18), (2, 9, 9)):
        wrong = Weight(
            weight.name, weight.base, weight.members, {"gram": dict.fromkeys("ab", torch.eye(shape[-1]).expand(shape))}
        )
        with pytest.raises(MethodError, match="belongs to another model"):
            blocks_of(wrong)


def test_files_hold_grams_of_groups(make, tmp_path):
    task = make("groups")
    partial = measure(task, grams(5))
    shapes = {name: tuple(value.shape) for name, value in task.model.state_dict().items()}

    class Info:
        def __init__(self, shape):
            self.shape = shape

    path = str(tmp_path / "x.safetensors")
    save(path, grams(5), partial, checkpoint="c", data="d")
    file = StatisticsFile.open(path)
    file.check("c", {name: Info(shape) for name, shape in shapes.items()})
    assert file.read("middle.weight").shape == (2, 18, 18)
