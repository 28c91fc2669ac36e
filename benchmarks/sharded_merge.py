"""Seconds of a candidate's merge by shard actors, beside one process that holds the whole pool.

    python benchmarks/sharded_merge.py --parameters 2e7 8e7 --shards 1 2 4 --methods task_arithmetic ties

Random weights in the shapes of a Llama's layers, as checkpoints under `--directory`. A sharded candidate is timed from its
recipe's being sent to its weights' lying in the model; `waiting` is what an evaluator sees of that: the copy alone, since
the merge runs while the candidate before is measured. Shards have one thread each, as has the process that they are compared
with; prepared state and global statistics are there before the clock starts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.recipe import Recipe
from ray_tasks.connect import connect
from ray_tasks.evaluators.fed_evaluator import Delivery
from ray_tasks.sharded.nixl_transfer import ReceiveBuffers
from ray_tasks.sharded.placement import nodes, plan, sharded
from ray_tasks.sharded.shards import Receiver, Shards

LAYERS = 16


def opened(base: str, members: dict[str, str]) -> Material:
    """The pool, in any process."""
    return Material(Pool.open(base, members))


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of layers that have about so many parameters."""
    width = int((parameters / LAYERS / 12) ** 0.5) // 32 * 32
    each = {"attention.qkv": (3 * width, width), "attention.out": (width, width), "up": (4 * width, width)}
    each["down"] = (width, 4 * width)
    return {f"layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in each.items()}


def make_pool(directory: Path, parameters: float, members: int) -> Callable[[], Material]:
    """Writes a base and members of random float32 weights."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes(parameters).items()}
    paths = {name: directory / f"{parameters:g}-{name}" for name in ("base", *(f"member{n}" for n in range(members)))}
    for name, path in paths.items():
        path.mkdir(parents=True)
        moved = {key: value + 1e-3 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file(base if name == "base" else moved, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaModel"]}))
    base_path = str(paths.pop("base"))
    return partial(opened, base_path, {name: str(path) for name, path in paths.items()})


def recipes(method: str, members: list[str], repeats: int) -> Iterator[Recipe]:
    """One candidate after another, with other factors."""
    default = METHODS[method].default_recipe(members)
    for number in range(repeats + 1):
        yield Recipe(method, {m: f * (1 - 0.01 * number) for m, f in default.scaling.items()}, default.parameters)


def seconds(work: Callable[[Recipe], float], method: str, members: list[str], repeats: int) -> tuple[float, float]:
    """Medians over candidates after a first: of all, and of what `work` gives."""
    taken = []
    for recipe in recipes(method, members, repeats):
        start = time.perf_counter()
        part = work(recipe)
        taken.append((time.perf_counter() - start, part))
    return median(whole for whole, _ in taken[1:]), median(part for _, part in taken[1:])


def compare(
    opens: Callable[[], Material], methods: list[str], counts: list[int], repeats: int, transports: list[str]
) -> None:
    """Prints a row for every method and number of shards."""
    material = opens()
    members = list(material.pool.members)
    out = {name: torch.empty(info.shape) for name, info in material.pool.weights.items()}
    size = sum(value.nbytes for value in out.values())
    moved = (2 + len(members)) * size
    alone = {method: resident(material, out, method, repeats) for method in methods}
    for method, taken in alone.items():
        print(f"| {size / 1e6:.0f} | {method} | resident | {taken:.3f} | {moved / taken / 1e9:.1f} | | |")
    for count, transport in product(counts, transports):
        made = plan(material, methods, nodes(), evaluators=1, shards=count, direct=transport == "nixl")
        with sharded(opens, made, retries=1) as shards:
            for method in methods:
                whole, copy = fed(shards, material, out, method, members, repeats)
                how = f"{count} {transport} | {whole:.3f} | {moved / whole / 1e9:.1f} | {whole / alone[method]:.2f}"
                print(f"| {size / 1e6:.0f} | {method} | {how} | {copy:.3f} |")


def resident(material: Material, out: Mapping[str, torch.Tensor], method: str, repeats: int) -> float:
    """Seconds of a candidate in this process."""
    merger = ResidentMerger(material, out)

    def work(recipe: Recipe) -> float:
        merger.merge(recipe)
        return 0.0

    return seconds(work, method, list(material.pool.members), repeats)[0]


def fed(
    shards: Shards,
    material: Material,
    out: Mapping[str, torch.Tensor],
    method: str,
    members: list[str],
    repeats: int,
) -> tuple[float, float]:
    """Seconds of a candidate that shards merge, and of the copy alone."""
    import ray  # after ray_tasks, which settles its environment

    buffers = ReceiveBuffers(shards.parts) if shards.parts else None
    delivery, receiver = Delivery(material, out, buffers), Receiver(buffers.address) if buffers else None

    def work(recipe: Recipe) -> float:
        pieces = ray.get(shards.merge(recipe, receiver))
        start = time.perf_counter()
        delivery.take(pieces)
        delivery.merge(recipe)
        return time.perf_counter() - start

    return seconds(work, method, members, repeats)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[2e7, 8e7])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--transports", nargs="+", choices=["store", "nixl"], default=["store"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the pool is made, and removed from; default: temporary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| merged MB | method | shards | candidate s | GB/s | × resident | waiting s |\n|--:|---|--:|--:|--:|--:|--:|"
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory, connect():
        for parameters in arguments.parameters:
            opens = make_pool(Path(directory), parameters, arguments.members)
            compare(opens, arguments.methods, arguments.shards, arguments.repeats, arguments.transports)


if __name__ == "__main__":
    main()
