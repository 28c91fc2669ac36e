"""`resources.precision: auto`: bfloat16 where the hardware has it, is faster, and gives the same paired scores."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from flows.campaign.executor import RayExecutor
from flows.campaign.open_campaign import OpenCampaign
from flows.directory.campaign_directory import PRECISION, Directory
from flows.directory.progress import Display
from merging.evaluation.steps import Measurement
from merging.io import atomic, documents, storage
from merging.methods import METHODS
from merging.recipe import Recipe
from search.candidate import Candidate, Outcome
from search.early_stopping.anchor_examples import Traces
from search.in_flight import InFlight
from search.ledger.ledger import Ledger
from search.resolution import Gap, paired_variance

FLOAT32, BFLOAT16 = "float32", "bfloat16"


@dataclass(frozen=True)
class Choice:
    """The precision of a campaign's evaluations, and why.

    Args:
        precision: `float32` or `bfloat16`.
        why: In words, with the figures that it was chosen by.
        seconds: Precision → wall time of the plain average's evaluation on validation; empty where nothing was tried.
        difference: Its mean score in bfloat16 less that in float32; None where nothing was tried or can be paired.
        error: The standard error of that, example by example.
    """

    precision: str
    why: str
    seconds: Mapping[str, float]
    difference: float | None = None
    error: float | None = None


UNDECIDED = Choice(FLOAT32, "evaluations are in float32, for the campaign has not chosen yet (resources.precision)", {})
"""What stands in for a choice where a campaign was not begun."""


def has_bfloat16() -> bool:
    """Whether what this process evaluates on multiplies matrices of bfloat16 in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu: Any = torch.cpu
    probes = (getattr(cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe is not None and probe() for probe in probes)


def settled(
    opened: OpenCampaign, directory: Directory, executor: RayExecutor, ledger: Ledger, display: Display
) -> OpenCampaign:
    """The campaign with its precision decided, for these and all later evaluators; as it was where the file says which.

    What was decided once holds for the campaign's directory: it is read when the campaign goes on.
    """
    if opened.campaign.resources.precision != "auto":
        return opened
    choice = kept_choice(directory)
    if choice is None:
        with display.phase("Precision: float32 or bfloat16"):
            choice = _chosen(opened, executor, ledger)
            atomic.write_json(directory / PRECISION, asdict(choice))
            display.say(f"  {choice.why}")
    executor.precision = choice.precision
    return with_choice(opened, choice)


def kept_choice(directory: Directory) -> Choice | None:
    """What was decided for a campaign's directory; None where nothing was yet."""
    path = directory / PRECISION
    return documents.read_as(path, lambda value: Choice(**value)) if storage.exists(path) else None


def with_choice(opened: OpenCampaign, choice: Choice) -> OpenCampaign:
    """The campaign with its precision decided."""
    resources = opened.campaign.resources.model_copy(update={"precision": choice.precision})
    return replace(opened, campaign=opened.campaign.model_copy(update={"resources": resources}))


def choose(float32: Measurement, bfloat16: Measurement) -> Choice:
    """Which precision, given a candidate in both on the same examples: bfloat16 where it is faster and scores the same.

    Scores are the same where their mean over tasks differs by no more than twice its standard error.
    """
    seconds = {FLOAT32: float32.evaluate_seconds or 0.0, BFLOAT16: bfloat16.evaluate_seconds or 0.0}
    times = f"{seconds[BFLOAT16]:.2f} s in bfloat16, {seconds[FLOAT32]:.2f} s in float32"
    one, other = (dict(result.trace.influences) if result.trace else {} for result in (bfloat16, float32))
    variances = [paired_variance(task, one, other) for task in float32.scores]
    known = [variance for variance in variances if variance is not None]
    if len(known) < len(variances):
        why = f"evaluations are in float32, for not all tasks give one number an example to compare ({times})"
        return Choice(FLOAT32, why, seconds)
    means = [float((one[task].astype(np.float64) - other[task]).mean()) for task in float32.scores]
    gap = Gap(sum(means) / len(means), sum(known) ** 0.5 / len(known), True)
    apart = f"scores differ by {gap.value:+.4f} ± {gap.standard_error:.4f}"
    if abs(gap.value) > gap.least:
        precision, why = FLOAT32, f"float32, for {apart} in bfloat16 ({times})"
    elif seconds[BFLOAT16] >= seconds[FLOAT32]:
        precision, why = FLOAT32, f"float32, for bfloat16 is not faster: {times}; {apart}"
    else:
        precision, why = BFLOAT16, f"bfloat16: {times}; {apart}"
    return Choice(precision, f"evaluations are in {why}", seconds, gap.value, gap.standard_error)


def _chosen(opened: OpenCampaign, executor: RayExecutor, ledger: Ledger) -> Choice:
    if ledger.rows():
        return Choice(FLOAT32, "evaluations are in float32, for some were made before there was a choice", {})
    if not executor.everywhere(has_bfloat16):
        return Choice(FLOAT32, "evaluations are in float32: not every evaluator's hardware has bfloat16", {})
    recipe = METHODS["average"].default_recipe(list(opened.pool.members), opened.pool.model_type)
    # bfloat16 first: what only the first measurement pays for must not speak against float32
    tried = {precision: _tried(opened, executor, recipe, precision) for precision in (BFLOAT16, FLOAT32)}
    float32, bfloat16 = tried[FLOAT32], tried[BFLOAT16]
    if float32 is None or bfloat16 is None:
        return Choice(FLOAT32, "evaluations are in float32: the plain average could not be measured in both", {})
    return choose(float32, bfloat16)


def _tried(opened: OpenCampaign, executor: RayExecutor, recipe: Recipe, precision: str) -> Measurement | None:
    """The recipe on validation; None where it failed."""
    in_flight = InFlight(executor, opened.campaign.resources.retries)
    with executor.planned(Traces()), executor.afresh(precision):
        in_flight.submit(Candidate(recipe, "validation", "reference"))
        outcomes: list[Outcome] = []
        while not outcomes:
            outcomes = in_flight.wait()
    return outcomes[0].measurement
