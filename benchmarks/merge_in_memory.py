"""Seconds per candidate of every merge method, beside what a plain copy of as many bytes takes.

    python benchmarks/merge_in_memory.py --members 8 --layers 6 --hidden 384 --vocabulary 30522 --dtype float32
    python benchmarks/merge_in_memory.py --growth

Random weights in the shapes of a BERT encoder (the defaults are all-MiniLM-L6-v2's, 22.7M parameters); `prepare` once,
then candidates of different scaling factors, into preallocated float32 weights. On a CPU the seconds are the process's
own, which other work on the machine disturbs less than it does the clock. Copies and methods take turns, and the least
of all turns counts. `--growth` has members and sizes vary instead; `--plot growth.svg` draws that.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from merging.methods import METHODS, Context, Weight

GROWTH = (2, 4, 8, 16)
"""Numbers of members."""


def shapes(layers: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a BERT encoder's weights."""
    result: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (vocabulary, hidden)}
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
            result[f"encoder.layer.{layer}.{name}.weight"] = shape
            result[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            result[f"encoder.layer.{layer}.{name}.weight"] = (hidden,)
            result[f"encoder.layer.{layer}.{name}.bias"] = (hidden,)
    return result


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


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call: of the processor on a CPU, by the clock on an accelerator."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Candidates:
    """A prepared method, and candidates of it that differ in their scaling factors.

    Args:
        name: The method.
        weights: The pool.
        out: Where merges go.
        device: Of all of it.
    """

    def __init__(self, name: str, weights: list[Weight], out: dict[str, torch.Tensor], device: str) -> None:
        method = METHODS[name]
        self._recipe = method.default_recipe(list(weights[0].members)[: method.most_members])
        self._out, self._device = out, device

        def prepare() -> None:
            self._prepared = method.prepare(weights, Context(global_stats=method.global_pass(weights)))

        self.ready = seconds(prepare, device)
        self.times: list[float] = []
        self.first = self.next()
        self.times.clear()

    def next(self) -> float:
        """Seconds of one more candidate."""
        turn = len(self.times)
        scaling = {m: a * (1 + 0.01 * turn) + 1e-3 * i for i, (m, a) in enumerate(self._recipe.scaling.items())}
        self.times.append(
            seconds(partial(self._prepared.merge, scaling, self._recipe.parameters, self._out), self._device)
        )
        return self.times[-1]


def compare(arguments: argparse.Namespace) -> None:
    """Every method beside a copy, one line each."""
    weights = pool(arguments)
    out = {w.name: torch.empty(w.base.shape, dtype=torch.float32, device=arguments.device) for w in weights}
    stored = sum(value.nbytes for w in weights for value in (w.base, *w.members.values()))
    written = sum(value.nbytes for value in out.values())
    source = torch.ones(stored // 8, dtype=torch.float32, device=arguments.device)
    copied = torch.empty_like(source)
    methods = {name: Candidates(name, weights, out, arguments.device) for name in arguments.methods}
    copies = []
    for _ in range(arguments.repeats):
        copies.append(seconds(lambda: copied.copy_(source), arguments.device))
        for candidates in methods.values():
            candidates.next()
    bandwidth = 2 * source.nbytes / min(copies)
    limit = (stored + written) / bandwidth
    parameters = sum(w.base.numel() for w in weights)
    print(f"{parameters / 1e6:.1f}M parameters, {arguments.members} members, {arguments.dtype}: {stored / 1e9:.2f} GB")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s; reading the pool and writing a merge at that rate: {limit:.4f} s\n")
    reference = methods["task_arithmetic"].times if "task_arithmetic" in methods else [float("nan")]
    print("| method | prepare s | first s | candidate s | × copy | × task arithmetic |\n|---|--:|--:|--:|--:|--:|")
    for name, candidates in methods.items():
        each = min(candidates.times)
        figures = (candidates.ready, candidates.first, each, each / limit, each / min(reference))
        print(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")


def grow(arguments: argparse.Namespace) -> None:
    """Candidates' cost for 2 … 16 members and three sizes."""
    cells: dict[tuple[str, int], list[float]] = {}
    for hidden in (arguments.hidden // 4, arguments.hidden // 2, arguments.hidden):
        for members in GROWTH:
            weights = pool(argparse.Namespace(**{**vars(arguments), "members": members, "hidden": hidden}))
            out = {w.name: torch.empty(w.base.shape, device=arguments.device) for w in weights}
            size = sum(w.base.numel() for w in weights)
            for name in arguments.methods:
                candidates = Candidates(name, weights, out, arguments.device)
                each = min(candidates.next() for _ in range(arguments.repeats))
                cells.setdefault((name, size), []).append(each)
    print("| method | parameters | " + " | ".join(f"{members} members" for members in GROWTH) + " |")
    print("|---|--:|" + "--:|" * len(GROWTH))
    for (name, size), row in sorted(cells.items()):
        shown = [f"{t * 1e3:.1f} ms ({t / size / members * 1e9:.2f})" for t, members in zip(row, GROWTH, strict=True)]
        print(f"| {name} | {size / 1e6:.1f}M | {' | '.join(shown)} |")
    print("\nIn brackets: nanoseconds per parameter and member.")
    if arguments.plot:
        plot(arguments, cells)


def plot(arguments: argparse.Namespace, cells: dict[tuple[str, int], list[float]]) -> None:
    """Draws milliseconds over members, a panel a method and a line a size; dotted: as much for every member."""
    import matplotlib as mpl
    from matplotlib import pyplot, ticker

    mpl.use("svg")
    figure, panels = pyplot.subplots(1, len(arguments.methods), figsize=(3.2 * len(arguments.methods), 3), sharey=True)
    for panel, name in zip(panels, arguments.methods, strict=True):
        for (_, size), row in sorted((key, row) for key, row in cells.items() if key[0] == name):
            (line,) = panel.plot(GROWTH, [1e3 * t for t in row], marker="o", label=f"{size / 1e6:.1f}M parameters")
            ideal = [1e3 * row[-1] * members / GROWTH[-1] for members in GROWTH]
            panel.plot(GROWTH, ideal, linestyle=":", color=line.get_color())
        panel.set(title=name, xlabel="members", xscale="log", yscale="log", xticks=GROWTH)
        panel.set_xticks(GROWTH, [str(members) for members in GROWTH])
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(ticker.ScalarFormatter())
        panel.minorticks_off()
    panels[0].set_ylabel("CPU ms a candidate")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(arguments.plot)


def main() -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--growth", action="store_true", help="vary members and sizes")
    parser.add_argument("--plot", help="where to draw the growth")
    parser.add_argument("--methods", nargs="*", help="names; all by default, four where members grow")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.growth:
        arguments.methods = arguments.methods or ["task_arithmetic", "ties", "fisher", "regmean"]
        grow(arguments)
    else:
        arguments.methods = arguments.methods or [name for name in METHODS if METHODS[name].solution is None]
        compare(arguments)


if __name__ == "__main__":
    main()
