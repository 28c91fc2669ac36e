"""Seconds per candidate of every merge method, beside what a plain copy of as many bytes takes.

    python benchmarks/merge_in_memory.py --members 8 --layers 6 --hidden 384 --vocabulary 30522 --dtype
    float32

Random weights in the shapes of a BERT encoder (the defaults are all-MiniLM-L6-v2's, 22.7M parameters);
`prepare` once, then the median over candidates of different scaling factors, into preallocated float32
weights.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from merging.methods import METHODS, Context, Weight


def shapes(layers: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a BERT encoder's weights."""
    found: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (vocabulary, hidden)}
    for layer in range(layers):
        linear = {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (4 * hidden, hidden),
            "output.dense": (hidden, 4 * hidden),
        }
        for name, shape in linear.items():
            found[f"encoder.layer.{layer}.{name}.weight"] = shape
            found[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found[f"encoder.layer.{layer}.{name}.weight"] = (hidden,)
            found[f"encoder.layer.{layer}.{name}.bias"] = (hidden,)
    return found


def pool(arguments: argparse.Namespace) -> list[Weight]:
    """Random base, members 2 % away from it, Fisher information and Grams."""
    generator = torch.Generator().manual_seed(0)
    dtype, to = getattr(torch, arguments.dtype), arguments.device
    members = [f"member{index}" for index in range(arguments.members)]
    shared: dict[str, dict[str, torch.Tensor]] = {}
    weights = []
    for name, shape in shapes(arguments.layers, arguments.hidden, arguments.vocabulary).items():
        base = torch.randn(shape, generator=generator) * 0.05
        moved = {m: (base + 1e-3 * torch.randn(shape, generator=generator)).to(to, dtype) for m in members}
        statistics = {"fisher": {m: (torch.rand(shape, generator=generator) * 1e-4).to(to) for m in members}}
        if len(shape) == 2 and not name.startswith("embeddings"):
            key = name.rsplit(".", 2)[0] if "self." in name else name
            if key not in shared:
                samples = {m: torch.randn(2 * shape[1], shape[1], generator=generator) for m in members}
                shared[key] = {m: (x.T @ x / len(x)).to(to) for m, x in samples.items()}
            statistics["gram"] = shared[key]
        weights.append(Weight(name, base.to(to, dtype), moved, statistics))
    return weights


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall time of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="names; all of them by default")
    arguments = parser.parse_args()

    weights = pool(arguments)
    members = list(weights[0].members)
    out = {w.name: torch.empty(w.base.shape, dtype=torch.float32, device=arguments.device) for w in weights}
    stored = sum(value.nbytes for w in weights for value in (w.base, *w.members.values()))
    written = sum(value.nbytes for value in out.values())
    source = torch.ones(stored // 8, dtype=torch.float32, device=arguments.device)
    copied = torch.empty_like(source)
    copies = [seconds(lambda: copied.copy_(source), arguments.device) for _ in range(arguments.repeats + 1)]
    bandwidth = 2 * source.nbytes / median(copies[1:])
    limit = (stored + written) / bandwidth
    parameters = sum(w.base.numel() for w in weights)
    print(f"{parameters / 1e6:.1f}M parameters, {len(members)} members, {arguments.dtype}: {stored / 1e9:.2f} GB")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s; reading the pool and writing a merge at that rate: {limit:.4f} s\n")
    columns = ("prepare s", "first s", "candidate s", "× copy", "× task arithmetic")
    print(f"{'method':<20}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    reference = None
    for name in sorted(arguments.methods, key=lambda known: known != "task_arithmetic"):
        method = METHODS[name]
        recipe = method.default_recipe(members[: method.most_members])
        start = time.perf_counter()
        prepared = method.prepare(weights, Context(survey=method.survey(weights)))
        ready = time.perf_counter() - start
        times = []
        for repeat in range(arguments.repeats + 1):
            scaling = {m: a * (1 + 0.01 * repeat) + 1e-3 * i for i, (m, a) in enumerate(recipe.scaling.items())}
            run = partial(prepared.merge, scaling, recipe.parameters, out)
            times.append(seconds(run, arguments.device))
        each = median(times[1:])
        reference = reference or each
        figures = (ready, times[0], each, each / limit, each / reference)
        cells = (f"{figure:>{len(column) + 3}.3f}" for figure, column in zip(figures, columns, strict=True))
        print(f"{name:<20}" + "".join(cells))


if __name__ == "__main__":
    main()
