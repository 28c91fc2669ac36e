import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.methods import METHODS, Context, Weight
from merging.statistics import STATISTICS, LikelihoodSettings, OutputGramSettings, StatisticSettings, measure, save
from merging.tasks import TextClassificationSettings, make_task

TINY = ("one", "two", "three")
SETTINGS = {
    "fisher": LikelihoodSettings(examples=24),
    "gram": StatisticSettings(examples=24),
    "output_gram": OutputGramSettings(examples=24),
}


@dataclass(frozen=True)
class TinyMaterial:
    """The tiny pool with every member's statistics of its own task, and the tasks."""

    material: Material
    tasks: list[Any]
    owners: dict[str, str]


@pytest.fixture(scope="session")
def tiny_material(tiny_pool, tiny_campaign, tmp_path_factory) -> TinyMaterial:
    place = tmp_path_factory.mktemp("statistics")
    members = {name: str(tiny_pool[name]) for name in TINY}
    pool = Pool.open(str(tiny_pool["base"]), members)
    settings = {name: TextClassificationSettings(**tiny_campaign["tasks"][name]) for name in TINY}
    tasks = [make_task(name, settings[name], members[name]) for name in TINY]
    found: dict[str, dict[str, Any]] = {kind: {} for kind in SETTINGS}
    for task in tasks:
        for kind in SETTINGS:
            statistic = STATISTICS[kind](SETTINGS[kind])
            file = save(
                str(place / f"{task.name}.{kind}.safetensors"),
                statistic,
                measure(task, statistic, "train"),
                checkpoint=pool.members[task.name].checkpoint.fingerprint,
                data="d",
            )
            found[kind][task.name] = file
    return TinyMaterial(Material(pool, found), tasks, {name: name for name in TINY})


MEMBERS = ("amazon", "movie", "nyt", "tweets")
EXAMPLES = {"amazon": 300, "movie": 120, "nyt": 50, "tweets": 700, "base": 1000}


@pytest.fixture(scope="session")
def reference():
    """The module of the methods' float64 references."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).parent / "methods" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(seed=0, members=MEMBERS, width=8, dtypes=(torch.float32,), spread=0.1, tokens=64):
    """A small encoder's weights: q, k, v that share a Gram, a Conv1D, biases, an embedding, a scalar."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embeddings.word.weight": (3 * width + 1, width),
        "layer.0.query.weight": (width, width),
        "layer.0.key.weight": (width, width),
        "layer.0.value.weight": (width // 2, width),
        "layer.0.query.bias": (width,),
        "layer.0.up.weight": (2 * width, width),
        "layer.0.down.weight": (width, 2 * width),
        "layer.0.norm.weight": (width,),
        "layer.1.conv.weight": (width, width),
        "layer.1.wide.weight": (width, 3 * width),
        "layer.1.down.weight": (width, 2 * width),
        "scale": (),
    }
    conv = {"layer.1.conv.weight", "layer.1.wide.weight"}
    shared = {}
    weights = []
    for name, shape in shapes.items():
        base = torch.randn(shape, generator=g)
        values = {m: base + spread * torch.randn(shape, generator=g) for m in members}
        fisher = {m: torch.randn(shape, generator=g).square() * 1e-3 for m in (*members, "base")}
        statistics = {} if name == "scale" else {"fisher": fisher}
        if len(shape) == 2 and not name.startswith("embeddings"):
            inputs = shape[0] if name in conv else shape[1]
            key = "qkv" if name.split(".")[-2] in ("query", "key", "value") else name
            if key not in shared:
                mix = torch.randn(inputs, inputs, generator=g)
                x = {m: torch.randn(tokens, inputs, generator=g) @ mix for m in members}
                shared[key] = {m: v.T @ v / tokens for m, v in x.items()}
            statistics["gram"] = shared[key]
            outputs = shape[1] if name in conv else shape[0]
            gradients = {m: 0.01 * torch.randn(tokens, outputs, generator=g) for m in members}
            statistics["output_gram"] = {m: v.T @ v / tokens for m, v in gradients.items()}
        kinds = [dtypes[i % len(dtypes)] for i in range(len(members) + 1)]
        weights.append(
            Weight(
                name,
                base.to(kinds[-1]),
                {m: v.to(kind) for (m, v), kind in zip(values.items(), kinds, strict=False)},
                statistics,
                transposed=name in conv,
            )
        )
    return weights


@pytest.fixture
def make_pool():
    return build


@pytest.fixture
def subset():
    """Some members of a pool's weights."""
    return lambda weights, members: [
        replace(
            w,
            members={m: w.members[m] for m in members},
            statistics={k: {m: v for m, v in s.items() if m in (*members, "base")} for k, s in w.statistics.items()},
        )
        for w in weights
    ]


@pytest.fixture
def merge():
    """Merges a pool through the public interface."""

    def run(name, weights, scaling, parameters=None, *, examples=EXAMPLES, parts=1, dtype=torch.float32):
        method = METHODS[name]
        recipe = method.complete(
            replace(method.default_recipe(list(scaling)), scaling=scaling, parameters=parameters or {})
        )
        pieces = [weights[i::parts] for i in range(parts)]
        global_stats = None
        for piece in pieces:
            part = method.global_pass(piece)
            global_stats = part if global_stats is None else method.combine(global_stats, part)
        out = {w.name: torch.full(w.base.shape, float("nan"), dtype=dtype) for w in weights}
        for piece in pieces:
            prepared = method.prepare(piece, Context(examples=examples, global_stats=global_stats))
            prepared.merge(recipe.scaling, recipe.parameters, {w.name: out[w.name] for w in piece})
        return out

    return run


@pytest.fixture
def complete():
    """A method's parameters, all spelled out."""

    def run(name, scaling, parameters=None):
        method = METHODS[name]
        recipe = replace(method.default_recipe(list(scaling)), scaling=scaling, parameters=parameters or {})
        return dict(method.complete(recipe).parameters)

    return run


@pytest.fixture
def assert_close():
    """Asserts that two merges agree, relative to each tensor's largest entry."""

    def check(merged, expected, tolerance=1e-5):
        assert merged.keys() == expected.keys()
        for name, value in merged.items():
            wanted = expected[name].double()
            error = (value.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
            assert error <= tolerance, f"{name}: relative error {error:.3g}"

    return check
