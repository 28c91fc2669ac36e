"""The quick start from nothing: fetch, cut, fine-tune four members, and run a campaign on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.campaign.run import run as run_campaign
from flows.config.campaign_file import Campaign
from flows.config.search_settings import DEFAULT_METHODS
from flows.config.yaml_file import validate
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.quickstart.data import DOMAINS, write_splits
from flows.quickstart.fetch import VADER, fetch, fetch_base
from flows.quickstart.training import Trained, TrainingSettings, train_member
from merging.io import storage
from ray_tasks.connect import connect
from ray_tasks.jobs.parallel import each

CANDIDATES = 36
METHODS = (*DEFAULT_METHODS, "regmean_propagated")
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
    calls = {name: (base, file, members / name, settings) for name, file in train.items()}
    with display.phase(f"Members: fine-tuning {len(train)} models"), display.bar("percent", 100) as bar:
        for name, trained in each(_train, calls, progress=lambda share: bar.reach(int(100 * share))):
            how = "there already" if trained.reused else f"{trained.seconds:.0f} s, training loss {trained.loss:.3f}"
            display.say(f"  {name}: {how}")


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
        "statistics": {
            "fisher": {"examples": 128},
            "representation": {"examples": 64},
            "propagated": {"examples": 160},
        },
        "search": {"methods": list(METHODS), "candidates": candidates or CANDIDATES},
        "test": {"top": 1},
    }
    return validate(Campaign, settings, "quick start")


def _train(base: Path, train: Path, out: Path, settings: TrainingSettings, report: Callable[[float], None]) -> Trained:
    return train_member(base, train, out, settings, lambda done, total, loss: report(done / total))
