"""Merges in memory beside fusion-bench: processor seconds of a candidate, of the same models, with results compared.

    python benchmarks/beside_fusion_bench.py --members 8

A random BERT in the shape that is asked for (default: MiniLM's) and members near it, float32, already in memory, with
given Fisher information and Grams. fusion-bench runs in an environment of its own, made with pip under `--directory`, and
merges anew for every candidate, which is all that it offers; mergequest prepares once. One thread each, the least of the
repeats; `difference` is the norm of what both results differ by, over that of fusion-bench's merged task vector.

`first` is `prepare` and the first candidate, `candidate` another of the same members; both have one factor for all members,
as all that fusion-bench merges. `own, first` and `own` are the same with a factor for each member, `subset` a candidate with
one factor that leaves out another member each time.
"""

import argparse
import contextlib
import copy
import io
import json
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

PEER = "fusion-bench==0.2.33"
METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {},
    "ties": {},
    "dare": {},
    "model_stock": {},
    "iso_c": {"factor": 1.0},
    "tsv_m": {"factor": 1.0},
    "fisher": {},
    "regmean": {"parameters": {"rho": 0.9}},
}
"""Our names; scaling factor and parameters where they are not our defaults."""
DRAWN = ("dare",)
"""Methods whose results hang on chance."""


class Models:
    """Base, members and statistics, the same in every process that makes them.

    Args:
        arguments: The command line's.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, arguments.hidden // 32),
            intermediate_size=4 * arguments.hidden,
            type_vocab_size=max(2, arguments.members),  # TSV-M takes equal shares of every matrix's rank
        )
        self.base = BertModel(config, add_pooling_layer=False).eval()
        self.members = {f"member{index}": copy.deepcopy(self.base) for index in range(arguments.members)}
        self.fisher: dict[str, dict[str, Tensor]] = {}
        self.gram: dict[str, dict[str, Tensor]] = {}
        common = [1e-3 * torch.randn(value.shape) for value in self.base.parameters()]
        for name, member in self.members.items():
            for value, part in zip(member.parameters(), common, strict=True):
                value.data.add_(part).add_(torch.randn(value.shape), alpha=1e-3)
            self.fisher[name] = {key: torch.rand(value.shape) for key, value in member.named_parameters()}
            self.gram[name] = {
                key: self._gram(module.in_features)
                for key, module in member.named_modules()
                if isinstance(module, nn.Linear)
            }

    def _gram(self, width: int) -> Tensor:
        inputs = torch.randn(2 * width, width)
        return inputs.T @ inputs / len(inputs)


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returns."""
    start = time.process_time()
    result = run(*arguments)
    return time.process_time() - start, result


def peer(arguments: argparse.Namespace) -> None:
    """fusion-bench's side, in its own environment: figures as JSON on the last line, results in files."""
    from fusion_bench import BaseModelPool
    from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.isotropic_merging.iso import IsotropicMergingInCommonSubspace
    from fusion_bench.method.model_stock.model_stock import ModelStock
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.simple_average import SimpleAverageAlgorithm
    from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm
    from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging
    from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm

    models = Models(arguments)
    values = {
        name: [member.get_parameter(name).data for member in models.members.values()]
        for name, _ in models.base.named_parameters()
    }
    algorithms: Mapping[str, Callable[[], Any]] = {
        "average": lambda: SimpleAverageAlgorithm(inplace=False),
        "task_arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3, inplace=False),
        "ties": lambda: TiesMergingAlgorithm(scaling_factor=1.0, threshold=20, remove_keys=[], merge_func="mean"),
        "dare": lambda: DareTaskArithmetic(scaling_factor=0.3, sparsity_ratio=0.5, only_on_linear_weights=False),
        "model_stock": ModelStock,
        "iso_c": lambda: IsotropicMergingInCommonSubspace(scaling_factor=1.0),
        "tsv_m": lambda: TaskSingularVectorMerging(alpha=1.0),
    }
    by_statistics: Mapping[str, Callable[[], Any]] = {
        "fisher": lambda: merging_with_fisher_weights(
            values, list(models.fisher.values()), torch.ones(len(models.members)) / len(models.members)
        ),
        "regmean": lambda: merging_with_regmean_weights(values, list(models.gram.values()), 0.9),
    }
    figures: dict[str, Any] = {}
    for name in arguments.methods:
        try:
            times = []
            for _ in range(arguments.repeats):
                if name in by_statistics:
                    took, result = timed(by_statistics[name])
                else:
                    pool = BaseModelPool({"_pretrained_": copy.deepcopy(models.base), **copy.deepcopy(models.members)})
                    took, result = timed(algorithms[name]().run, pool)
                times.append(took)
            figures[name] = min(times)
            weights = result.state_dict() if isinstance(result, nn.Module) else result
            save_file({key: value.contiguous() for key, value in weights.items()}, arguments.directory / f"{name}.peer")
        except Exception as error:
            figures[name] = f"{type(error).__name__}: {error}"[:200]
    print("\n" + json.dumps(figures))


@dataclass
class Measured:
    """Processor seconds of one method's candidates, and the first one's weights, flat."""

    first: float
    candidate: float
    own_first: float
    own: float
    subset: float
    result: Tensor


def ours(arguments: argparse.Namespace) -> dict[str, Measured]:
    """Of every method: what a first and other candidates take."""
    from merging.methods import METHODS as OURS
    from merging.methods import Context, Weight
    from merging.recipe import Recipe

    models = Models(arguments)
    grams: dict[str, dict[str, Tensor]] = {}
    for member, results in models.gram.items():
        for module, gram in results.items():
            grams.setdefault(f"{module}.weight", {})[member] = gram
    weights = [
        Weight(
            name,
            value.data,
            {member: model.get_parameter(name).data for member, model in models.members.items()},
            {"fisher": {member: fisher[name] for member, fisher in models.fisher.items()}}
            | ({"gram": grams[name]} if name in grams else {}),
        )
        for name, value in models.base.named_parameters()
    ]
    out = {weight.name: torch.empty_like(weight.base) for weight in weights}
    measured = {}
    for name in arguments.methods:
        method = OURS[name]
        factor = METHODS[name].get("factor", method.scaling.default)
        scaling = dict.fromkeys(models.members, float(factor))
        parameters = method.complete(Recipe(name, scaling, METHODS[name].get("parameters", {}))).parameters
        for chosen in (weights[-1:], weights):  # the first loads what is compiled
            start = time.process_time()
            prepared = method.prepare(chosen, Context(global_stats=method.global_pass(chosen)))
            prepared.merge(scaling, parameters, out)
            first = time.process_time() - start
        result = torch.cat([value.flatten() for value in out.values()])
        members = list(scaling)
        shared = [dict.fromkeys(members, factor * (1 + 0.01 * turn)) for turn in range(1, arguments.repeats + 1)]
        own = [{m: factor * (1 + 0.01 * (turn + i)) for i, m in enumerate(members)} for turn in range(len(shared) + 1)]
        rest = [{m: factor for m in members if m != left_out} for left_out in members[: arguments.repeats]]
        again, (own_first, *own_again), less = (
            [timed(prepared.merge, candidate, parameters, out)[0] for candidate in candidates]
            for candidates in (shared, own, rest)
        )
        measured[name] = Measured(first, min(again), own_first, min(own_again), min(less), result)
        del prepared
    return measured


def peer_python(directory: Path) -> Path | str:
    """The interpreter of fusion-bench's environment, installed if need be; or why there is none."""
    python = directory / "fusion-bench" / "bin" / "python"
    if not python.exists():
        venv.create(directory / "fusion-bench", with_pip=True)
    if subprocess.run([str(python), "-c", "import fusion_bench"], capture_output=True, check=False).returncode:
        command = [str(python), "-m", "pip", "install", "-q", PEER, "torch>=2.6,<2.14"]
        installed = subprocess.run(command, capture_output=True, check=False)
        if installed.returncode:
            return f"pip could not install {PEER}: {installed.stderr.decode()[-300:]}"
    return python


def table(arguments: argparse.Namespace, figures: Mapping[str, Any], measured: Mapping[str, Measured]) -> None:
    """Prints both sides in Markdown."""
    parameters = dict(Models(arguments).base.named_parameters())
    base = torch.cat([value.data.flatten() for value in parameters.values()])
    columns = ("fusion-bench s", "first s", "candidate s", "own, first s", "own s", "subset s")
    columns += ("ratio, first", "ratio, candidate", "ratio, subset", "difference")
    print(f"| method | {' | '.join(columns)} |")
    print("|---|" + "--:|" * len(columns))
    for name, results in measured.items():
        theirs = figures[name]
        times = (results.first, results.candidate, results.own_first, results.own, results.subset)
        cells = " | ".join(f"{took:.3f}" for took in times)
        if isinstance(theirs, str):
            print(f"| {name} | {theirs} | {cells} | | | | |")
            continue
        stored = load_file(arguments.directory / f"{name}.peer")
        other = torch.cat([stored[key].flatten() for key in parameters])
        difference = float((other - results.result).norm() / (other - base).norm())
        shown = "by chance" if name in DRAWN else f"{difference:.1e}"
        ratios = f"{theirs / results.first:.1f}× | {theirs / results.candidate:.0f}× | {theirs / results.subset:.1f}×"
        print(f"| {name} | {theirs:.2f} | {cells} | {ratios} | {shown} |")


def main(argv: Sequence[str]) -> None:
    """Measures and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--directory", type=Path, default=Path.home() / ".cache" / "mergequest-benchmarks")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.peer:
        peer(arguments)
        return
    python = peer_python(arguments.directory)
    if isinstance(python, str):
        print(f"fusion-bench: {python}")
        figures: dict[str, Any] = dict.fromkeys(arguments.methods, "not installed")
    else:
        command = [str(python), __file__, "--peer", *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        figures = json.loads(done.stdout.strip().splitlines()[-1])
    with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        measured = ours(arguments)
    table(arguments, figures, measured)


if __name__ == "__main__":
    main(sys.argv[1:])
