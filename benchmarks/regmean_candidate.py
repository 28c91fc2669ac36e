"""Seconds of one RegMean candidate beside computing it anew from the statistics, as other tools do for every merge.

    python benchmarks/regmean_candidate.py --members 4

`anew` is the formula as it is usually written: Σ G̃_t, Σ G̃_t @ W_tᵀ and a matrix inverse for every layer, in float32.
`gram` solves prepared sums once more for every candidate (factors weigh the Grams; ρ may change); `contribution` scales
each member's prepared part of the solution (ρ and members as before), and `one factor` the solution of all; `subset` has one
factor for other members each time, which are solved anew. Statistics are given to all; `mean`, the plain mean of the
members, is what memory allows.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from merge_in_memory import pool, seconds

from merging.methods import METHODS, Context, Prepared, Weight
from merging.recipe import Value


def anew(weights: list[Weight], scaling: dict[str, float], rho: float, out: dict[str, torch.Tensor]) -> None:
    """RegMean from its statistics, layer by layer."""
    for weight in weights:
        grams = weight.statistics.get("gram", {})
        if not grams:
            out[weight.name].copy_(torch.stack([weight.members[member] for member in scaling]).mean(0))
            continue
        left = right = torch.zeros(())
        for member, factor in scaling.items():
            soft = factor * (rho * grams[member] + (1 - rho) * torch.diag(grams[member].diagonal()))
            left, right = left + soft, right + soft @ weight.members[member].T
        out[weight.name].copy_((torch.linalg.inv(left) @ right).T)


def candidate(
    prepared: Prepared,
    parameters: dict[str, Value],
    change: Callable[[dict[str, float]], dict[str, float]],
    out: dict[str, torch.Tensor],
    scaling: dict[str, float],
) -> None:
    """One merge with factors that were changed to what is measured."""
    prepared.merge(change(scaling), parameters, out)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    arguments.dtype, arguments.device = "float32", "cpu"
    torch.set_num_threads(1)

    weights = pool(arguments)
    members = list(weights[0].members)
    out = {w.name: torch.empty(w.base.shape) for w in weights}
    method = METHODS["regmean"]
    mean = METHODS["average"].prepare(weights, Context())
    defaults = method.default_recipe(members).parameters
    changes: dict[str, Callable[[dict[str, float]], dict[str, float]]] = {
        "gram": dict,
        "contribution": dict,
        "one factor": lambda scaling: dict.fromkeys(scaling, scaling[members[0]]),
        "subset": lambda scaling: dict.fromkeys(
            set(members) - {members[round(100 * scaling[members[0]]) % len(members)]}, 1.0
        ),
    }
    runs = {"anew": lambda scaling: anew(weights, scaling, 0.9, out)}
    for name, change in changes.items():
        prepared = method.prepare(weights, Context())
        parameters = {**defaults, "factors": "gram" if name == "gram" else "contribution"}
        runs[name] = partial(candidate, prepared, parameters, change, out)
    runs["mean"] = lambda scaling: mean.merge(scaling, {}, out)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.repeats + 1):  # the first turn allocates, and solves the contributions
        scaling = {member: 1.0 + 0.01 * turn + 0.001 * index for index, member in enumerate(members)}
        for name, run in runs.items():
            times[name].append(seconds(partial(run, scaling), "cpu"))
    print(f"{sum(w.base.numel() for w in weights) / 1e6:.1f}M parameters, {len(members)} members\n")
    print("| | first s | candidate s | anew / this |\n|---|--:|--:|--:|")
    for name, (first, *later) in times.items():
        print(f"| {name} | {first:.3f} | {min(later):.4f} | {min(times['anew'][1:]) / min(later):.1f} |")


if __name__ == "__main__":
    main()
