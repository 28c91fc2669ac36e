"""The quick start from nothing: fetch, cut, fine-tune four members, and run a campaign on them."""

from pathlib import Path
from typing import Any

import ray

from flows.campaign import run as run_campaign
from flows.config import Campaign, validate
from flows.directory import Directory
from flows.progress import Display
from flows.quickstart.data import DOMAINS, write_splits
from flows.quickstart.fetch import VADER, fetch, fetch_base
from flows.quickstart.training import TrainingSettings, train_member
from merging import storage
from ray_tasks.cluster import connect

CANDIDATES = 48
MAX_LENGTH = 64
"""Tokens: nine sentences in ten are shorter."""


def run(directory: str, cache: str, candidates: int | None, display: Display) -> str:
    """Builds the pool and runs the campaign; whatever is there already is used again.

    Args:
        directory: Filled with data, members and what a campaign leaves.
        cache: Where downloads are kept.
        candidates: Candidates to evaluate; by default `CANDIDATES`.
        display: Shows progress.

    Returns:
        The results table and the places of what was left.

    Raises:
        MergequestError: Something cannot be fetched or written.
    """
    root, kept = Path(storage.absolute(directory)), Path(storage.absolute(cache))
    with display.phase("Base model and texts"):
        base = fetch_base(kept, display.say)
        splits = write_splits(fetch(VADER, kept, display.say), root / "data")
    files = {domain: {str(split): str(file) for split, file in parts.items()} for domain, parts in splits.items()}
    campaign = make_campaign(root, base, files, candidates)
    if Directory(str(root)).is_finished(campaign):
        return run_campaign(campaign, display)
    with connect():
        train_members(base, {domain: parts["train"] for domain, parts in splits.items()}, root / "members", display)
        return run_campaign(campaign, display)


def train_members(base: Path, train: dict[str, Path], members: Path, display: Display) -> None:
    """Fine-tunes a member on each domain, one a core, unless they are there."""
    settings = TrainingSettings(max_length=MAX_LENGTH)
    remote = ray.remote(num_cpus=1)(_train)
    with display.phase(f"Members: fine-tuning {len(train)} models"):
        watch = ray.remote(num_cpus=0)(_Watch).remote()
        out = {remote.remote(base, file, members / name, settings, name, watch): name for name, file in train.items()}
        with display.bar("steps of 100", 100 * len(train)) as bar:
            shown = 0
            while out:
                ready, _ = ray.wait(list(out), num_returns=1, timeout=1.0)
                progress: dict[str, float] = ray.get(watch.read.remote())
                done = int(100 * sum(progress.values()))
                bar.advance(done - shown)
                shown = done
                for reference in ready:
                    name, (loss, seconds, reused) = out.pop(reference), ray.get(reference)
                    display.say(
                        f"  {name}: {'there already' if reused else f'{seconds:.0f} s, training loss {loss:.3f}'}"
                    )


def make_campaign(root: Path, base: Path, splits: dict[str, dict[str, str]], candidates: int | None) -> Campaign:
    """The quick start's campaign, a file that a user can take as an example."""
    settings: dict[str, Any] = {
        "name": "quickstart",
        "directory": str(root),
        "base": str(base),
        "members": {domain: {"checkpoint": str(root / "members" / domain)} for domain in DOMAINS},
        "tasks": {
            domain: {"kind": "text_classification", "data": files, "max_length": MAX_LENGTH}
            for domain, files in splits.items()
        },
        "statistics": {"shard": 128, "representation": {"examples": 64}},
        "search": {"candidates": candidates or CANDIDATES},
    }
    return validate(Campaign, settings, "quick start")


def _train(
    base: Path, train: Path, out: Path, settings: TrainingSettings, name: str, watch: Any
) -> tuple[float, float, bool]:
    import torch

    torch.set_num_threads(1)

    def progress(done: int, total: int, loss: float) -> None:
        if done % 5 == 0 or done == total:
            watch.note.remote(name, done / total)

    trained = train_member(base, train, out, settings, progress)
    watch.note.remote(name, 1.0)
    return trained.loss, trained.seconds, trained.reused


class _Watch:
    """Where members under training say how far they are."""

    def __init__(self) -> None:
        self._progress: dict[str, float] = {}

    def note(self, name: str, share: float) -> None:
        self._progress[name] = share

    def read(self) -> dict[str, float]:
        return self._progress
