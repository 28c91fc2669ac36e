"""What a user sees while work goes on: phases with their times, bars on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flows.directory.heartbeat import Pulse
from merging.io.secrets import redacted

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal to draw a bar on."""


class Bar:
    """A count towards a total, with a word on how it goes."""

    def __init__(self, console: Console, title: str, total: int, each: Callable[[], None] = lambda: None) -> None:
        self._each = each
        self._console, self._title, self._total = console, title, total
        self._done, self._note, self._printed = 0, "", time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(title, total=total, note="")
            self._progress.start()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Counts steps; `note` replaces what is said beside the count."""
        self._each()
        changed = steps > 0 or note not in (None, self._note)
        self._done += steps
        self._note = self._note if note is None else note
        if self._progress:
            self._progress.update(self._task, completed=self._done, note=self._note)
        elif changed and time.monotonic() - self._printed >= LINE_EVERY:
            self._printed = time.monotonic()
            line = f"  {self._title} {self._done}/{self._total} {self._note}".rstrip()
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def reach(self, done: int) -> None:
        """Counts up to `done`, for work that tells how far it is."""
        self.advance(done - self._done)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._progress:
            self._progress.stop()


@dataclass
class Display:
    """A console, and the seconds that each phase took.

    Args:
        console: Where to write.
        timings: Phase → seconds, summed over its runs.
        pulse: What is told of the work to those who look from elsewhere.
    """

    console: Console = field(default_factory=lambda: Console(stderr=True))
    timings: dict[str, float] = field(default_factory=dict)
    pulse: Pulse = field(default_factory=Pulse)

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(redacted(text), markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that a user should not overlook, though nothing is wrong."""
        self.console.print(f"  [yellow]note:[/] {escape(redacted(text))}", highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announces a phase and takes its time."""
        self.pulse.steering.stop_here()
        self.console.print(f"[bold]{escape(name)}[/]", highlight=False)
        self.pulse.phase = name
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.timings[name] = self.timings.get(name, 0.0) + seconds
            self.console.print(f"  [dim]{seconds:.1f} s[/]", highlight=False)

    @contextmanager
    def bar(self, title: str, total: int, *, may_stop: bool = True) -> Iterator[Bar]:
        """A bar for the block, which ends where somebody asks for it, unless the block itself sees to that."""
        bar = Bar(self.console, title, total, self.pulse.steering.stop_here if may_stop else lambda: None)
        try:
            yield bar
        finally:
            bar.close()
