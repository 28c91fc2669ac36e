"""Runs experiments: `python -m benchmarks.papers gradient_matching.figure_2 --pool continued --seed 0`.

    python -m benchmarks.papers                       # all, on all their pools; what these very settings made is kept
    python -m benchmarks.papers --page                # docs/papers.md, tables and figures anew from the results
    python -m benchmarks.papers regmean.figure_3 --campaign campaign.yaml   # on members and tasks of one's own

A result is a Parquet file in benchmarks/papers/results. Members, statistics and every single measurement are kept by content
below `--root`, shared by all experiments, so an interrupted run goes on where it was.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.papers.bench import Bench
from benchmarks.papers.page import write_page
from benchmarks.papers.pools import POOLS, PaperPool, of_campaign
from benchmarks.papers.result import is_of, save
from flows.directory.progress import Display
from merging.errors import MergequestError
from merging.io import hashing
from merging.registry import did_you_mean
from merging.tasks.user_functions import code_of

EXPERIMENTS = (
    "gradient_matching.figure_2",
    "gradient_matching.table_1",
    "gradient_matching.figure_1",
    "gradient_matching.removal",
    "regmean.table_2",
    "regmean.table_8",
    "regmean.figure_6",
    "regmean.figure_3",
    "quality_diversity.figure_1",
    "quality_diversity.table_1",
    "quality_diversity.table_2",
    "mats.residual",
    "mats.intermediate",
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


def settings_of(name: str, examples: int | None, *, multi_task: bool) -> str:
    """Hash of what an experiment's result is made by, besides the pool: its code, and how much is measured."""
    return hashing.fingerprint([code_of(module(name).run), examples or 0, multi_task])


def run(
    name: str, build: Callable[[Display], PaperPool], results: Path, examples: int | None, *, multi_task: bool = True
) -> Path:
    """Runs an experiment and writes its result.

    Args:
        name: One of `EXPERIMENTS`.
        build: Makes the pool.
        results: Where results are kept.
        examples: Most test examples of a task; None for all.
        multi_task: Whether the rows of one model trained on all tasks are wanted.

    Returns:
        The result's file.
    """
    display, started = Display(), time.monotonic()
    with display.phase(name):
        pool = build(display)
        display.say(f"  {pool.name}, seed {pool.seed}: members {', '.join(pool.campaign.members)}")
        result = module(name).run(Bench(pool if multi_task else replace(pool, together=None), display, examples))
    path = results / f"{name}.{pool.name}.{pool.seed}.parquet"
    settings = settings_of(name, examples, multi_task=multi_task)
    facts = {"experiment": name, "about": about(name), "pool": pool.name, "seed": pool.seed, "examples": examples or 0}
    save(result, path, settings, seconds=time.monotonic() - started, **facts)
    for claim in result.claims:
        display.say(f"  {claim.verdict}: {claim.claim}: {claim.ours}")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"by default all: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--pool", action="append", help="by default every pool of an experiment")
    parser.add_argument("--campaign", help="a campaign file in place of pools: its members, on its tasks")
    parser.add_argument("--seed", type=_natural, action="append", help="of the members' training; default: 0")
    parser.add_argument("--root", type=Path, default=Path("runs/papers"), help="where pools and measurements are kept")
    parser.add_argument(
        "--results", type=Path, help="where results are kept: benchmarks/papers/results, or of a campaign below --root"
    )
    parser.add_argument(
        "--examples",
        type=_natural,
        help=f"most test examples of a task, 0 for all; by default {EXAMPLES}, or 200, and all of a campaign",
    )
    parser.add_argument(
        "--no-multi-task", action="store_true", help="train no model on all tasks, and leave its row out"
    )
    parser.add_argument("--again", action="store_true", help="also run what has a result of these settings")
    parser.add_argument("--page", action="store_true", help="only write the page, tables and figures from the results")
    given = parser.parse_args()
    if strange := [name for name in given.experiments if name not in EXPERIMENTS]:
        parser.error(f"unknown experiment '{strange[0]}'. {did_you_mean(strange[0], list(EXPERIMENTS))}")
    if strange := [pool for pool in given.pool or () if pool not in POOLS]:
        parser.error(f"unknown pool '{strange[0]}'. {did_you_mean(strange[0], list(POOLS))}")
    if given.campaign and (given.pool or given.seed):
        parser.error("--campaign takes the place of --pool and --seed")
    torch.set_num_threads(1)
    try:
        if given.campaign:
            _on_campaign(given)
        else:
            _on_pools(given)
    except MergequestError as error:
        parser.exit(1, f"{error}\n")


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 up")
    return int(text)


def _on_campaign(given: argparse.Namespace) -> None:
    root = given.root.absolute()
    results = given.results or root / "results"
    for name in given.experiments or EXPERIMENTS:
        run(name, lambda display: of_campaign(given.campaign, root), results, given.examples or None)
    print(f"mergequest report --experiment {results} makes a page of it")


def _on_pools(given: argparse.Namespace) -> None:
    root, results = given.root.absolute(), given.results or RESULTS
    for name in () if given.page else given.experiments or EXPERIMENTS:
        for pool in given.pool or module(name).POOLS:
            for seed in given.seed or (0,):
                most = EXAMPLES.get(pool, 200) if given.examples is None else given.examples
                settings = settings_of(name, most, multi_task=not given.no_multi_task)
                if given.again or not is_of(results / f"{name}.{pool}.{seed}.parquet", settings):
                    build = partial(POOLS[pool], root, seed)
                    run(name, build, results, most or None, multi_task=not given.no_multi_task)
    write_page(results, HERE.parents[1] / "docs")


if __name__ == "__main__":
    main()
