"""What candidates are measured on: everything, as much as it takes to tell them apart, or a few examples for the rest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil

from flows.campaign.executor import RayExecutor
from flows.campaign.open_campaign import OpenCampaign
from flows.directory.campaign_directory import Directory
from flows.report.table import plain_average
from merging.io import storage
from search.candidate import ANCHORS, Candidate, Planner, Provenance
from search.early_stopping.anchor_examples import Anchors, Traces, make_anchors
from search.early_stopping.wilcoxon import make_pruning
from search.in_flight import InFlight, measure
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import Objective, best
from search.steering import Steering

STEPS = {"wilcoxon": 8, "halving": 4}
"""In how many steps the largest task is measured, where the campaign file does not say."""


def search_split(opened: OpenCampaign) -> str:
    """The split that the search's candidates are measured on."""
    return ANCHORS if opened.campaign.search.anchor_examples else "validation"


def make_planner(opened: OpenCampaign, objective: Objective, directory: Directory, ledger: Ledger) -> Planner | None:
    """What says on which examples the search's candidates are measured; None for all."""
    settings = opened.campaign.search
    if settings.anchor_examples:
        return Anchors.read(_anchors_file(directory))
    policy = settings.pruning or "none"
    step = settings.examples_per_step or ceil(_largest(opened) / STEPS.get(policy, 1))
    return make_pruning(policy, objective, max(1, step), ledger.rows(), directory / "pruning")


@contextmanager
def choosing_anchors(
    opened: OpenCampaign, directory: Directory, executor: RayExecutor, references: Sequence[Candidate]
) -> Iterator[None]:
    """Keeps what references are found to say of single examples within the block, and chooses anchor examples by that.

    Args:
        opened: The campaign.
        directory: Where the anchor examples are kept; those that are there stay.
        executor: Measures the references that the block did not, for their rows are there already.
        references: Base and members.
    """
    count = opened.campaign.search.anchor_examples
    if count is None or storage.exists(_anchors_file(directory)):
        yield
        return
    traces = Traces()
    with executor.planned(traces):
        yield
        missing = [candidate for candidate in references if candidate.recipe.identity not in traces.by_recipe]
        in_flight = InFlight(executor, opened.campaign.resources.retries)
        while missing or len(in_flight):
            while missing and in_flight.has_room:
                in_flight.submit(missing.pop())
            in_flight.wait()
    reference_traces = [
        traces.by_recipe[c.recipe.identity] for c in references if c.recipe.identity in traces.by_recipe
    ]
    make_anchors(reference_traces, count, opened.campaign.seed).write(_anchors_file(directory))


def confirm(
    opened: OpenCampaign,
    executor: RayExecutor,
    ledger: Ledger,
    objective: Objective,
    provenance: Provenance,
    steering: Steering,
) -> list[Row]:
    """Measures on the whole validation set what the anchor examples found best: overall, of each method, plain average.

    Winners are chosen among these rows alone, so that no estimate wins.
    """
    settings = opened.campaign.search
    estimated = [replace(row, split="validation") for row in ledger.rows() if row.split == ANCHORS]
    ranked = best(estimated, len(estimated))
    average = plain_average(estimated)
    chosen = [*ranked[: settings.confirm], *{row.method: row for row in reversed(ranked)}.values()]
    chosen += [average] if average else []
    candidates = [Candidate(row.recipe, "validation", row.origin, row.trial) for row in chosen]
    retries = opened.campaign.resources.retries
    return measure(candidates, executor, ledger, objective, provenance, retries, steering)


def _anchors_file(directory: Directory) -> str:
    return directory / "anchors.safetensors"


def _largest(opened: OpenCampaign) -> int:
    """Validation examples of the task that has most, as far as they are measured."""
    limit = opened.campaign.search.examples
    sizes = [task.size("validation") for task in opened.tasks.values()]
    return min(max(sizes), limit) if limit else max(sizes)
