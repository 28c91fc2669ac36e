"""Tells who watches how the search gets on: here by a bar, elsewhere by the pulse."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from flows.directory.heartbeat import Pulse
from flows.directory.progress import Bar
from search.budget import Progress
from search.ledger.row import Row


@dataclass
class ProgressDisplay:
    """Shows the search's progress."""

    bar: Bar
    pulse: Pulse

    def on_start(self, progress: Progress) -> None:
        """Shows what was done before."""
        self.pulse.progress = progress
        self.bar.reach(progress.done)

    def on_row(self, row: Row, progress: Progress) -> None:
        """Counts a row and shows the best so far, the rate, and when a budget will be spent."""
        self.pulse.progress = progress
        best, notes = progress.best, []
        if best is not None:
            notes.append(f"best {best.objective:.4f} ({best.method}, {len(best.members)} members)")
        if progress.per_minute is not None:
            notes.append(f"{progress.per_minute:.1f} a minute")
        if progress.seconds_left:
            notes.append(f"until about {datetime.now() + timedelta(seconds=progress.seconds_left):%H:%M:%S}")
        if row.status == "failed":
            notes.append(f"failed: {row.method}")
        self.bar.advance(1, ", ".join(notes))
