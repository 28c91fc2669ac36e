"""A small model's weights with members and statistics, drawn at random, and merges of them through the public interface."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merging.methods import METHODS, Context, Weight
from merging.recipe import Value

MEMBERS = ("amazon", "movie", "nyt", "tweets")
EXAMPLES = {"amazon": 300, "movie": 120, "nyt": 50, "tweets": 700, "base": 1000}
"""Training examples behind each."""


def make_weights(
    seed: int = 0,
    members: Sequence[str] = MEMBERS,
    width: int = 8,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    spread: float = 0.1,
    tokens: int = 64,
) -> list[Weight]:
    """A small encoder's weights: q, k, v that share a Gram, a Conv1D, biases, an embedding, a scalar.

    Args:
        seed: Of all draws.
        members: Their names.
        width: Of its hidden states.
        dtypes: In turn those of the members and the base.
        spread: Size of the task vectors' entries.
        tokens: Behind each Gram.
    """
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
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
    shared: dict[str, dict[str, Tensor]] = {}
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


def subset(weights: Sequence[Weight], members: Sequence[str] | Mapping[str, float]) -> list[Weight]:
    """The weights of a pool of some of the members."""
    return [
        replace(
            weight,
            members={m: weight.members[m] for m in members},
            statistics={
                kind: {m: v for m, v in values.items() if m in (*members, "base")}
                for kind, values in weight.statistics.items()
            },
        )
        for weight in weights
    ]


def complete(
    name: str, scaling: Mapping[str, float], parameters: Mapping[str, Value] | None = None
) -> dict[str, Value]:
    """A method's parameters, all spelled out."""
    method = METHODS[name]
    recipe = replace(method.default_recipe(list(scaling)), scaling=scaling, parameters=parameters or {})
    return dict(method.complete(recipe).parameters)


def merge(
    name: str,
    weights: Sequence[Weight],
    scaling: Mapping[str, float],
    parameters: Mapping[str, Value] | None = None,
    *,
    examples: Mapping[str, int] = EXAMPLES,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Merges weights as a whole, or in parts that know of each other only by the global pass."""
    method = METHODS[name]
    settings = complete(name, scaling, parameters)
    pieces = [list(weights[i::parts]) for i in range(parts)]
    global_stats = None
    for piece in pieces:
        part = method.global_pass(piece)
        global_stats = part if global_stats is None else method.combine(global_stats, part)
    out = {w.name: torch.full(w.base.shape, float("nan"), dtype=dtype) for w in weights}
    for piece in pieces:
        prepared = method.prepare(piece, Context(examples=examples, global_stats=global_stats))
        prepared.merge(scaling, settings, {w.name: out[w.name] for w in piece})
    return out


def assert_close(merged: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Asserts that two merges agree, relative to each tensor's largest entry."""
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        wanted = expected[name].double()
        error = float((value.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.3g}"


def identical(merged: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> bool:
    """Whether two merges are the same bits."""
    return all(torch.equal(merged[name], again[name]) for name in merged)
