"""`mergequest campaign status`: how far a campaign is, from its directory alone."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from flows.directory import Directory
from search.ledger import Ledger
from search.objective import best

RECENT = 50
"""Rows that the current rate is taken from."""


@dataclass(frozen=True)
class Status:
    """A campaign's state.

    Args:
        name: The campaign.
        state: `finished`, or `unfinished` (running, stopped or killed).
        done: Candidates measured on validation, failed ones included.
        failed: Those that failed.
        total: The budget.
        per_minute: Recent rate; None before there are two rows.
        minutes_left: At that rate; None where unknown.
        best: Objective of the best so far; None before there is one.
        best_method: Its method.
        best_members: Its members.
        last: When the last row was written.
    """

    name: str
    state: str
    done: int
    failed: int
    total: int
    per_minute: float | None
    minutes_left: float | None
    best: float | None
    best_method: str | None
    best_members: list[str]
    last: str | None

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """A few lines."""
        lines = [f"{self.name}: {self.state}, {self.done} of {self.total} candidates, {self.failed} failed"]
        if self.best is not None:
            lines.append(f"best {self.best:.4f}: {self.best_method} of {', '.join(self.best_members)}")
        if self.last is not None:
            lines.append(f"last row {self.last}")
        if self.state != "finished" and self.minutes_left is not None:
            lines.append(f"{self.per_minute:.1f} candidates a minute; about {self.minutes_left:.0f} minutes left")
        return "\n".join(lines)


def read_status(path: str) -> Status:
    """The state of the campaign in a directory.

    Raises:
        SettingsError: There is no campaign there.
    """
    directory = Directory(path)
    campaign = directory.campaign()
    rows = Ledger(directory.ledger, campaign.name).rows()
    tried = sorted((row for row in rows if row.origin in ("anchor", "search")), key=lambda row: row.finished)
    recent = tried[-RECENT:]
    span = (recent[-1].finished - recent[0].finished).total_seconds() / 60 if len(recent) > 1 else 0.0
    rate = (len(recent) - 1) / span if span > 0 else None
    top = best(rows)
    left = max(campaign.search.candidates - len(tried), 0)
    return Status(
        name=campaign.name,
        state="finished" if directory.is_finished(campaign) else "unfinished",
        done=len(tried),
        failed=sum(row.status == "failed" for row in tried),
        total=campaign.search.candidates,
        per_minute=rate,
        minutes_left=left / rate if rate else None,
        best=top[0].objective if top else None,
        best_method=top[0].method if top else None,
        best_members=list(top[0].members) if top else [],
        last=max((row.finished for row in rows), default=datetime.now(UTC)).isoformat(timespec="seconds")
        if rows
        else None,
    )
