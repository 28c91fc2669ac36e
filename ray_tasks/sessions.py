"""Directories of local Ray sessions: ours are marked, and those of processes that are no more are removed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from merging.io.process import is_gone, this_process

MARKER = "mergequest.json"
KEPT = 3
"""The last sessions of processes that are no more stay: their logs may be wanted."""


def mark(session: Path) -> None:
    """Says whose a session is."""
    with suppress(OSError):
        (session / MARKER).write_text(json.dumps(this_process()))


def remove_dead(root: Path, kept: int = KEPT) -> list[Path]:
    """Removes sessions of this user's mergequest processes that are no more, but for the last few.

    Sessions without our mark, of other users, machines or containers, and such that any process still names in its
    command line (a raylet that outlived its driver) are left alone.

    Args:
        root: Where sessions lie.
        kept: How many of them stay.

    Returns:
        What was removed.
    """
    dead = sorted(_dead(root), key=lambda session: session.name)[: -kept or None]
    if not dead:
        return []
    named = "\n".join(part for process in psutil.process_iter() for part in _command(process))
    removed = [session for session in dead if session.name not in named]
    for session in removed:
        shutil.rmtree(session, ignore_errors=True)
    return removed


def _dead(root: Path) -> Iterator[Path]:
    """Our sessions whose processes are known to be no more."""
    try:
        sessions = [entry for entry in root.iterdir() if entry.name.startswith("session_2")]
    except OSError:
        return
    for session in sessions:
        with suppress(OSError, ValueError):
            if session.is_symlink() or session.stat().st_uid != os.getuid():
                continue
            owner = json.loads((session / MARKER).read_text())
            if isinstance(owner, dict) and is_gone(owner):
                yield session


def _command(process: psutil.Process) -> list[str]:
    try:
        return [str(part) for part in process.cmdline()]
    except psutil.Error:
        return []
