"""The ledger's row: one fixed, versioned Arrow schema that people read for years after the cluster is gone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from merging.recipe import Recipe

VERSION = 2
READABLE = ("1", "2")
"""Versions of files that are read: 1 lacks the columns of cost and `sampler`, which are null then."""

Status = Literal["complete", "failed", "pruned"]
Origin = Literal["reference", "anchor", "search", "final"]
"""Why a row was measured: the base or a single member, beside which others are read; a baseline, which is called `anchor` here
because ledgers outlive words; a proposal of the sampler; the one measurement on test."""

SCHEMA = pa.schema(
    [
        pa.field("campaign", pa.string(), nullable=False),
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("trial", pa.int64()),
        pa.field("sampler", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("method", pa.string(), nullable=False),
        pa.field("members", pa.list_(pa.string()), nullable=False),
        pa.field("scaling", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("parameters", pa.string(), nullable=False),
        pa.field("objective", pa.float64()),
        pa.field("objectives", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("violations", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("standard_errors", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("losses", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("expected_errors", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("examples", pa.map_(pa.string(), pa.int64()), nullable=False),
        pa.field("proxies", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("report", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("merge_seconds", pa.float64()),
        pa.field("evaluate_seconds", pa.float64()),
        pa.field("cpu_hours", pa.float64()),
        pa.field("gpu_hours", pa.float64()),
        pa.field("started", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("finished", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("worker", pa.string()),
        pa.field("code", pa.string(), nullable=False),
        pa.field("data", pa.string(), nullable=False),
    ],
    metadata={"mergequest.ledger": str(VERSION)},
)


@dataclass(frozen=True)
class Row:
    """A candidate measured on a split, whatever became of it. Identity: (`candidate`, `split`).

    Args:
        campaign: The campaign's name.
        candidate: Content hash of method, scaling factors and parameters; with `split`, a row's identity.
        split: `validation`, `test`, or `anchors`: measured on the anchor examples of validation only, with estimates of the
            whole split as scores.
        origin: Why it was measured: `reference` (the base, a single member), `anchor` (a baseline: a method's defaults; the
            value's name is older than the word), `search` (a proposal of the sampler), `final` (on test, once).
        trial: Number of the Optuna trial; null for rows that no sampler hears of.
        sampler: What the sampler noted with its proposal, and of trials since the one before that led to no candidate: what a
            resumed search needs besides, see `search.study`. A JSON object in the file; null for rows without a trial.
        status: `complete`, `failed` (see `error`), or `pruned`: given up early, with the scores of the examples so far and no
            objective.
        error: Type and message of what failed.
        method: The method's name; `base` or `member` for reference rows.
        members: Names of the members that take part, sorted.
        scaling: Scaling factor of each `member`, or of each `member@group` of weights.
        parameters: The method's parameters, all spelled out; a JSON object in the file.
        objective: What the search maximises (the first of several); null unless complete.
        objectives: Name → value of everything that the search maximises.
        violations: Name of a constraint → by how much it is broken; 0 or less where it holds.
        scores: Task → the task's metric.
        standard_errors: Task → standard error of the score.
        losses: Task → mean loss over the examples (cross-entropy of a classifier).
        expected_errors: Task → 1 − the mean surrogate.
        examples: Task → number of examples evaluated.
        proxies: Name → a figure that needs no labels or fewer examples: `entropy:<task>` (mean entropy of the predictions,
            nats), `partial:objective` of a pruned row, `partial:objective@N` at a rung of N examples, `theory:<member>` (a
            predicted loss), `cached:<task>` (examples whose scores were in `evaluation.cache`, and not measured).
        report: Name → the method's own figure on the merge (a ridge that was added).
        merge_seconds: Wall time of the merge; null where it was not merged: all scores were in an `evaluation.cache`.
        evaluate_seconds: Wall time of the evaluation, all tasks.
        cpu_hours: CPUs that its evaluator held, times the hours that it was at work on it, lost attempts included.
        gpu_hours: The same of GPUs, or shares of one.
        started: When work on it began.
        finished: When its last score was there.
        worker: Host, process and device that did it.
        code: Version of mergequest, and of the commit where it is known.
        data: Fingerprint of pool, statistics and evaluation data.
    """

    campaign: str
    candidate: str
    split: str
    origin: Origin
    status: Status
    method: str
    members: tuple[str, ...] = ()
    scaling: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    trial: int | None = None
    sampler: Mapping[str, Any] | None = None
    error: str | None = None
    objective: float | None = None
    objectives: Mapping[str, float] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    expected_errors: Mapping[str, float] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    proxies: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)
    merge_seconds: float | None = None
    evaluate_seconds: float | None = None
    cpu_hours: float | None = None
    gpu_hours: float | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime = field(default_factory=lambda: datetime.now(UTC))
    worker: str | None = None
    code: str = ""
    data: str = ""

    @property
    def recipe(self) -> Recipe:
        """What was merged."""
        return Recipe(self.method, dict(self.scaling), dict(self.parameters))
