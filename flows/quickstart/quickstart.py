"""The quick start from nothing: fetch, cut, fine-tune members, and run a campaign on them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from flows.campaign.run import run as run_campaign
from flows.config.campaign_file import Campaign
from flows.config.yaml_file import validate
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.quickstart.images import IMAGES
from flows.quickstart.language import LANGUAGE
from flows.quickstart.sentiment import SENTIMENT
from flows.quickstart.seq2seq import SEQ2SEQ
from flows.quickstart.shipped_pool import Files, ShippedPool, first_examples
from flows.quickstart.tagging import TAGGING
from merging.errors import SettingsError
from merging.io import addresses
from merging.optimization.fine_tuning import Trained, TrainingSettings, train_member
from merging.registry import did_you_mean
from merging.tasks import AnyTaskSettings
from ray_tasks.connect import connect
from ray_tasks.jobs.parallel import each

POOLS: Mapping[str, ShippedPool] = {
    "sentiment": SENTIMENT,
    "tagging": TAGGING,
    "images": IMAGES,
    "language": LANGUAGE,
    "seq2seq": SEQ2SEQ,
}
NAMES: Mapping[str, str] = {"sentiment": "quickstart"}
"""Pool → its campaign's name where that is another."""


def run(
    pool: str,
    directory: str | None,
    cache: str,
    candidates: int | None,
    display: Display,
    *,
    examples: int | None = None,
) -> str:
    """Builds the pool and runs the campaign; whatever is there already is used again.

    Args:
        pool: One of `POOLS`.
        directory: Filled with data, members and what a campaign leaves; by default `runs/<campaign's name>`.
        cache: Where downloads are kept.
        candidates: Candidates to evaluate; by default the pool's own number.
        display: Shows progress.
        examples: Of each split of each task at most; by default the pool's own numbers.

    Returns:
        The results table and the places of what was left.

    Raises:
        MergequestError: There is no such pool, or something cannot be fetched or written.
    """
    if pool not in POOLS:
        raise SettingsError(f"unknown pool '{pool}'. {did_you_mean(pool, list(POOLS))}")
    made, name = POOLS[pool], NAMES.get(pool, pool)
    root, kept = Path(addresses.absolute(directory or f"runs/{name}")), Path(addresses.absolute(cache))
    with display.phase("Base model and data"):
        base = made.base(kept, display.say)
        files = data_files(made, kept, root, display, examples)
    campaign = make_campaign(made, name, root, base, files, candidates)
    if Directory(str(root)).is_finished(campaign):
        return run_campaign(campaign, display)
    with connect():
        train_members(made, base, files, root / "members", display)
        return run_campaign(campaign, display)


def data_files(pool: ShippedPool, cache: Path, root: Path, display: Display, examples: int | None = None) -> Files:
    """A pool's data below its campaign's directory, or the first examples of each split."""
    files = pool.data(cache, root / "data", display.say)
    return files if examples is None else first_examples(files, root / "data" / f"first-{examples}", examples)


def train_members(pool: ShippedPool, base: Path, files: Files, members: Path, display: Display) -> None:
    """Fine-tunes a member on each task, each with an evaluator's threads, unless they are there."""
    calls = {
        task: (base, task_settings(pool, parts), members / task, pool.training, pool.labels.get(task, ()))
        for task, parts in files.items()
    }
    with display.phase(f"Members: fine-tuning {len(calls)} models"), display.bar("percent", 100) as bar:
        threads = pool.resources.get("threads", 1)
        for name, trained in each(_train, calls, cpus=threads, progress=lambda share: bar.reach(int(100 * share))):
            how = "there already" if trained.reused else f"{trained.seconds:.0f} s, training loss {trained.loss:.3f}"
            display.say(f"  {name}: {how}")


def task_settings(pool: ShippedPool, files: Mapping[Any, Path]) -> AnyTaskSettings:
    """A task of a pool with its data."""
    given = {**pool.task, "data": {str(split): str(file) for split, file in files.items()}}
    settings: AnyTaskSettings = TypeAdapter(AnyTaskSettings).validate_python(given)
    return settings


def make_campaign(
    pool: ShippedPool, name: str, root: Path, base: Path, files: Files, candidates: int | None
) -> Campaign:
    """The pool's campaign, a file that a user can take as an example."""
    settings: dict[str, Any] = {
        "name": name,
        "directory": str(root),
        "base": str(base),
        "members": {task: _member(pool, root / "members" / task, parts) for task, parts in files.items()},
        "tasks": {
            task: {**pool.task, "data": {str(split): str(file) for split, file in parts.items()}}
            for task, parts in files.items()
        },
        "statistics": dict(pool.statistics),
        "search": {"methods": list(pool.methods), "candidates": candidates or pool.candidates},
        "distil": pool.distil if pool.distil is False else dict(pool.distil),
        "test": {"top": 1},
        "training": pool.training.model_dump(mode="json"),
        "resources": dict(pool.resources),
    }
    return validate(Campaign, settings, "quick start")


def _member(pool: ShippedPool, checkpoint: Path, files: Mapping[Any, Path]) -> dict[str, Any]:
    """What the campaign file says of a member."""
    member: dict[str, Any] = {"checkpoint": str(checkpoint)}
    if pool.calibration is not None:
        member["calibration"] = {**pool.calibration, "data": {"train": str(files["train"])}}
    return member


def _train(
    base: Path,
    task: AnyTaskSettings,
    out: Path,
    settings: TrainingSettings,
    labels: Sequence[str],
    report: Callable[[float], None],
) -> Trained:
    return train_member(base, task, out, settings, lambda done, total, loss: report(done / total), labels)
