"""Runs experiments: `python -m benchmarks.papers gradient_matching.figure_2 --pool continued --seed 0`.

    python -m benchmarks.papers                       # all, on all their pools; what is there already is kept
    python -m benchmarks.papers --page                # docs/papers.md, tables and figures anew from the results

A result is a Parquet file in benchmarks/papers/results. Members, statistics and every single measurement are kept by content
below `--root`, shared by all experiments, so an interrupted run goes on where it was.
"""

import argparse
import importlib
import time
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.papers.bench import Bench
from benchmarks.papers.page import write_page
from benchmarks.papers.pools import POOLS
from benchmarks.papers.result import save
from flows.directory.progress import Display

EXPERIMENTS = (
    "gradient_matching.figure_2",
    "gradient_matching.table_1",
    "gradient_matching.figure_1",
    "gradient_matching.removal",
    "regmean.table_2",
    "regmean.table_8",
    "regmean.figure_6",
    "regmean.figure_3",
    "quality_diversity.table_1",
    "quality_diversity.table_2",
    "mats.residual",
)
EXAMPLES = {"images": 60, "tagging": 150}
"""Pool → most test examples of a task; 200 for the others."""
HERE = Path(__file__).parent
RESULTS = HERE / "results"


def module(name: str) -> ModuleType:
    """An experiment by its name."""
    return importlib.import_module(f"benchmarks.papers.{name}")


def about(name: str) -> str:
    """What an experiment is about."""
    return (module(name).__doc__ or "").strip()


def run(name: str, pool: str, seed: int, root: Path, results: Path, examples: int | None) -> Path:
    """Runs an experiment and writes its result.

    Args:
        name: One of `EXPERIMENTS`.
        pool: One of `POOLS`.
        seed: Of the members' training.
        root: Where pools and measurements are kept.
        results: Where results are kept.
        examples: Most test examples of a task; None for all.

    Returns:
        The result's file.
    """
    display, started = Display(), time.monotonic()
    with display.phase(f"{name} on {pool}, seed {seed}"):
        built = POOLS[pool](root, seed, display)
        result = module(name).run(Bench(built, display, examples))
    path = results / f"{name}.{pool}.{seed}.parquet"
    facts = {"experiment": name, "about": about(name), "pool": pool, "seed": seed, "examples": examples or 0}
    save(result, path, seconds=time.monotonic() - started, **facts)
    for claim in result.claims:
        display.say(f"  {claim.verdict}: {claim.claim}: {claim.ours}")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"by default all: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--pool", action="append", help="by default every pool of an experiment")
    parser.add_argument("--seed", type=int, action="append", help="of the members' training; default: 0")
    parser.add_argument("--root", type=Path, default=Path("runs/papers"), help="where pools and measurements are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument(
        "--examples", type=int, help=f"most test examples of a task, 0 for all; by default {EXAMPLES}, or 200"
    )
    parser.add_argument("--again", action="store_true", help="also run what has a result")
    parser.add_argument("--page", action="store_true", help="only write the page, tables and figures from the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in () if given.page else given.experiments or EXPERIMENTS:
        for pool in given.pool or module(name).POOLS:
            for seed in given.seed or (0,):
                if given.again or not (given.results / f"{name}.{pool}.{seed}.parquet").exists():
                    most = EXAMPLES.get(pool, 200) if given.examples is None else given.examples
                    run(name, pool, seed, given.root.absolute(), given.results, most or None)
    write_page(given.results, HERE.parents[1] / "docs")


if __name__ == "__main__":
    main()
