"""`mergequest status`: how far a campaign is, from its directory alone, on any machine that can read it."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from math import isfinite
from statistics import median
from typing import Any

from flows.config.campaign_file import CAMPAIGN_FILE
from flows.directory.campaign_directory import Directory
from flows.directory.heartbeat import BEAT, FILE
from flows.report.cost import hours_in_words
from flows.report.scales import scales_of
from flows.report.table import objective_of, subset
from merging.errors import StorageError
from merging.io import documents, storage
from merging.io.documents import is_number
from search.candidate import ANCHORS
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import best

RECENT = 50
"""Rows that the rate is taken from, where no driver says it."""
SILENCE = 6 * BEAT
"""Seconds without a sign of life after which a driver no longer counts as running; clocks that differ count, too."""


@dataclass(frozen=True)
class Status:
    """A campaign's state.

    Args:
        name: The campaign.
        state: `finished`; `running`; `silent` (its driver gives no sign of life and did not end: killed, or cut off);
            `unfinished` (it ended before its budget was spent).
        phase: What the driver is doing, or was at its last sign of life; None before the first.
        done: Candidates measured, failed and pruned ones included.
        running: Candidates that evaluators are at work on.
        failed: Those of `done` that failed.
        pruned: Those of `done` whose measurement was ended early.
        total: The budget.
        per_minute: Recent rate; None before there are two rows.
        minutes_left: At that rate, or until another budget is spent; None where unknown.
        ends: When that would be.
        best: Objective of the best so far; None before there is one.
        best_error: Its standard error, where the objective is the mean over tasks; None where it is not known.
        is_estimate: Whether it was estimated from anchor examples, and none is confirmed on all of them yet.
        estimated: Candidates that were estimated from anchor examples; 0 in campaigns without them.
        confirmed: Candidates that were measured on the whole validation set.
        best_method: Its method.
        best_members: Its members.
        pool: All members; empty before the driver has opened the pool.
        evaluators: Evaluators that are there.
        busy: Those of them that are at work.
        driver: Host and process of the driver; None before its first sign of life.
        heard: When its last sign of life was written, by its own clock.
        seconds_silent: How long ago that is.
        ended: How the driver's run ended: `finished`, `interrupted`, or an error; None while it runs.
        last: When the last row was written.
        cpu_hours: CPU hours of all rows.
        gpu_hours: GPU hours of all rows.
        under_way: What evaluators are at work on, the longest first: candidate, split, method, members, seconds so far,
            share of the measurement that is done, where that is known.
        typical_seconds: Median time of the candidates measured so far; None before there are any.
        precision: What an automatic choice of the evaluations' precision came to, in words; empty where there was none.
    """

    name: str
    state: str
    phase: str | None = None
    done: int = 0
    running: int = 0
    failed: int = 0
    pruned: int = 0
    total: int = 0
    per_minute: float | None = None
    minutes_left: float | None = None
    ends: str | None = None
    best: float | None = None
    best_error: float | None = None
    is_estimate: bool = False
    estimated: int = 0
    confirmed: int = 0
    best_method: str | None = None
    best_members: list[str] = field(default_factory=list)
    pool: list[str] = field(default_factory=list)
    evaluators: int = 0
    busy: int = 0
    driver: str | None = None
    heard: str | None = None
    seconds_silent: float | None = None
    ended: str | None = None
    last: str | None = None
    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    under_way: list[dict[str, Any]] = field(default_factory=list)
    typical_seconds: float | None = None
    precision: str = ""

    @property
    def may_change(self) -> bool:
        """Whether looking again may show something else."""
        return self.state in ("running", "silent")

    def as_json(self) -> str:
        """One JSON object, on one line."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """A few lines."""
        counts = [f"{self.done} of {self.total} candidates", f"{self.running} running", f"{self.failed} failed"]
        counts += [f"{self.pruned} pruned"] if self.pruned else []
        lines = [f"{self.name}: {self.state}, {', '.join(counts)}"]
        if self.state == "running":
            lines.append(f"{self.phase or 'starting'}; {self.busy} of {self.evaluators} evaluators at work")
            if self.under_way:
                first = self.under_way[0]
                typical = f", of {self.typical_seconds:.1f} s as a rule" if self.typical_seconds is not None else ""
                what = f"{first['method']} of {self._subset(first['members'])}" if first["members"] else first["method"]
                share = f", {first['share']:.0%} done" if first["share"] is not None else ""
                lines.append(
                    f"longest under way: {what} ({first['candidate']}), {_ago(first['seconds'])}{share}{typical}"
                )
        if self.best is not None:
            error = f" ± {self.best_error:.4f}" if self.best_error is not None else ""
            lines.append(f"best {self.best:.4f}{error}: {self.best_method} of {self._subset(self.best_members)}")
        if self.estimated:
            of = f"{self.estimated} candidates are estimates from anchor examples, {self.confirmed} of them confirmed on all"
            lines.append(f"{of}; the best is {'an estimate' if self.is_estimate else 'confirmed'}")
        if self.state == "running" and self.per_minute is not None:
            left = f"; until about {self.ends} ({self.minutes_left:.0f} minutes)" if self.minutes_left else ""
            lines.append(f"{self.per_minute:.1f} candidates a minute ({self.per_minute / 60:.2g} a second){left}")
        if self.state != "finished" and self.driver is not None:
            lines.append(
                f"driver {self.driver}: last sign of life {_ago(self.seconds_silent or 0.0)} ago, {self._what()}"
            )
        if self.precision:
            lines.append(self.precision)
        if cost := hours_in_words(self.cpu_hours, self.gpu_hours):
            lines.append(cost)
        if self.last is not None:
            lines.append(f"last row {self.last}")
        return "\n".join(lines)

    def _subset(self, members: list[str]) -> str:
        return subset(members, self.pool)

    def _what(self) -> str:
        if self.state == "running":
            return "and at work"
        if self.ended is not None:
            return f"when it ended: {self.ended}"
        return f"in '{self.phase}': killed or cut off? Once it is gone, `mergequest resume` goes on"


def read_status(path: str, now: datetime | None = None) -> Status:
    """The state of the campaign in a directory.

    Args:
        path: The directory; a local path or an address.
        now: The time; by default this machine's.

    Raises:
        SettingsError: There is no campaign there.
    """
    directory = Directory(path)
    if not storage.exists(directory / CAMPAIGN_FILE) and (pulse := _pulse(directory)):
        return _opening(pulse, now or datetime.now(UTC))
    campaign = directory.campaign()
    rows = Ledger(directory.ledger, campaign.name).rows()
    split = ANCHORS if campaign.search.anchor_examples else "validation"
    tried = [row for row in rows if row.split == split and row.origin in ("anchor", "search")]
    confirmed, estimated = best(rows, len(rows)), best(rows, len(rows), ANCHORS)
    top = confirmed or estimated
    objective = objective_of(top[0], scales_of(campaign.tasks)) if top else None
    pulse = _pulse(directory)
    heard = datetime.fromisoformat(pulse["heard"]) if pulse else None
    now = now or datetime.now(UTC)
    silent = max((now - heard).total_seconds(), 0.0) if heard else None
    state = "finished" if directory.is_finished(campaign) else "unfinished"
    if state == "unfinished" and pulse and pulse["ended"] is None:
        state = "running" if silent is not None and silent < SILENCE else "silent"
    rate, left = pulse.get("per_minute"), pulse.get("seconds_left")
    if rate is None:
        moments = sorted(row.finished for row in tried)[-RECENT:]
        span = (moments[-1] - moments[0]).total_seconds() / 60 if len(moments) > 1 else 0.0
        rate = (len(moments) - 1) / span if span > 0 else None
    if left is None and rate and state != "finished":
        left = 60 * max(campaign.search.candidates - len(tried), 0) / rate
    ends = (heard or now) + timedelta(seconds=left) if left is not None and state == "running" else None
    is_running = state == "running"
    return Status(
        name=campaign.name,
        state=state,
        phase=pulse.get("phase"),
        done=len(tried),
        running=pulse["busy"] if is_running else 0,
        failed=sum(row.status == "failed" for row in tried),
        pruned=sum(row.status == "pruned" for row in tried),
        total=max(campaign.search.candidates, len(tried)),
        per_minute=rate,
        minutes_left=left / 60 if left is not None else None,
        ends=ends.isoformat(timespec="seconds") if ends else None,
        best=objective.value if objective else None,
        best_error=objective.standard_error if objective and isfinite(objective.standard_error) else None,
        is_estimate=bool(top) and not confirmed,
        estimated=len(estimated),
        confirmed=len(confirmed),
        best_method=top[0].method if top else None,
        best_members=list(top[0].members) if top else [],
        pool=list(campaign.members),
        evaluators=pulse["evaluators"] if is_running else 0,
        busy=pulse["busy"] if is_running else 0,
        driver=f"{pulse['host']}:{pulse['pid']}" if pulse else None,
        heard=pulse.get("heard"),
        seconds_silent=round(silent, 1) if silent is not None else None,
        ended=pulse.get("ended"),
        last=max(row.finished for row in rows).isoformat(timespec="seconds") if rows else None,
        cpu_hours=sum(row.cpu_hours or 0.0 for row in rows),
        gpu_hours=sum(row.gpu_hours or 0.0 for row in rows),
        under_way=pulse.get("under_way", []) if is_running else [],
        typical_seconds=median(took) if (took := [s for row in tried if (s := _seconds(row))]) else None,
        precision=directory.precision(),
    )


def _opening(pulse: dict[str, Any], now: datetime) -> Status:
    """The state of a campaign that has not come as far as its own file: its pool is being looked at, or was refused."""
    silent = max((now - datetime.fromisoformat(pulse["heard"])).total_seconds(), 0.0)
    alive = "running" if silent < SILENCE else "silent"
    return Status(
        name=pulse.get("name") or "campaign",
        state=alive if pulse.get("ended") is None else "unfinished",
        phase=pulse.get("phase"),
        driver=f"{pulse['host']}:{pulse['pid']}",
        heard=pulse["heard"],
        seconds_silent=round(silent, 1),
        ended=pulse.get("ended"),
    )


def _pulse(directory: Directory) -> dict[str, Any]:
    """What the driver said last; empty where it never said anything."""
    try:
        return documents.read_as(directory / FILE, _signs)
    except StorageError:  # whatever it was, the driver writes it anew in a moment
        return {}


def _signs(value: Any) -> dict[str, Any]:
    """`progress.json`, of which only what is used is taken."""
    heard = datetime.fromisoformat(value["heard"])
    if heard.tzinfo is None:
        raise ValueError("a time without its zone")
    numbers = {name: value.get(name) for name in ("evaluators", "busy", "per_minute", "seconds_left", "pid")}
    if not all(number is None or (is_number(number) and abs(number) < 1e12) for number in numbers.values()):
        raise ValueError("a count that is no number")
    under_way = [
        {
            "candidate": str(entry["candidate"]),
            "split": str(entry["split"]),
            "method": str(entry["method"]),
            "members": [str(member) for member in entry["members"]],
            "seconds": float(entry["seconds"]),
            "share": None if entry.get("share") is None else min(max(float(entry["share"]), 0.0), 1.0),
        }
        for entry in value.get("under_way") or []
    ]
    texts = {name: None if value.get(name) is None else str(value[name]) for name in ("name", "phase", "host", "ended")}
    counts = {name: int(numbers.pop(name) or 0) for name in ("evaluators", "busy")}
    return {"heard": value["heard"], "under_way": under_way, **counts, **numbers, **texts}


def _seconds(row: Row) -> float:
    """How long a candidate took."""
    return (row.merge_seconds or 0.0) + (row.evaluate_seconds or 0.0)


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
