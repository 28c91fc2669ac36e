"""What evaluators do, as counters that Ray exports for Prometheus; `infra/grafana` has a dashboard of them."""

import time

from ray.util.metrics import Counter, Gauge, Histogram

from merging.evaluation.steps import Measurement

PREFIX = "mergequest_"
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the histograms' buckets."""


class EvaluatorMetrics:
    """The metrics of one campaign's evaluators, kept by its driver: a killed evaluator takes none of them with it.

    Prometheus sees them with `ray_` before their names, counters with `_total` behind, and labels of Ray's own (node,
    process) beside `campaign`.

    Args:
        campaign: The campaign's name.
    """

    def __init__(self, campaign: str) -> None:
        self._tags = {"campaign": campaign}
        keys = ("campaign",)
        self._candidates = Counter(
            f"{PREFIX}candidates", "Candidates answered, by status: complete, pruned, failed.", (*keys, "status")
        )
        self._busy_seconds = Counter(
            f"{PREFIX}evaluator_busy_seconds", "Seconds that evaluators were at work, all together.", keys
        )
        self._lost = Counter(f"{PREFIX}workers_lost", "Evaluators that died at work, with their nodes or alone.", keys)
        self._there = Gauge(f"{PREFIX}evaluators", "Evaluators that are there.", keys)
        self._busy = Gauge(f"{PREFIX}evaluators_busy", "Evaluators that are at work.", keys)
        self._merge = Histogram(f"{PREFIX}merge_seconds", "Wall time of a candidate's merge.", SECONDS, keys)
        self._evaluate = Histogram(f"{PREFIX}evaluate_seconds", "Wall time of its evaluation.", SECONDS, keys)
        self._at_work, self._looked = 0, time.monotonic()

    def answered(self, measurement: Measurement | None) -> None:
        """Counts an assignment that came to an end; None for one that failed."""
        status = "failed" if measurement is None else "pruned" if measurement.pruned else "complete"
        self._candidates.inc(tags={**self._tags, "status": status})
        if measurement is not None:
            if measurement.merge_seconds is not None:
                self._merge.observe(measurement.merge_seconds, self._tags)
            self._evaluate.observe(measurement.evaluate_seconds, self._tags)

    def lost(self) -> None:
        """Counts an evaluator that died at work."""
        self._lost.inc(tags=self._tags)

    def look(self, there: int, at_work: int) -> None:
        """Notes how many evaluators there are, and at work from now on."""
        now = time.monotonic()
        if (busy := (now - self._looked) * self._at_work) > 0:
            self._busy_seconds.inc(busy, self._tags)
        self._at_work, self._looked = at_work, now
        self._there.set(there, self._tags)
        self._busy.set(at_work, self._tags)
