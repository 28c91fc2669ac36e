"""How much memory this process may still take: of the machine, and of the container that it runs in."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Limits from here on are none: version 1 writes the largest multiple of a page."""


def available_memory(mount: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes that the machine has left, or the control groups of this process, whichever is less.

    Args:
        mount: Where control groups are mounted, of version 1 or 2.
        own: Which of them this process is in.
    """
    return min([psutil.virtual_memory().available, *_left(mount, own)])


def _left(mount: Path, own: Path) -> Iterator[int]:
    """What each limited control group above this process has left."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for directory, (limit, usage, inactive) in [
        *((group, ("memory.max", "memory.current", "inactive_file")) for group in _groups(mount, own, "")),
        *((group, names) for group in _groups(mount / "memory", own, "memory")),
    ]:
        with suppress(OSError, ValueError):  # no such file, or `max`
            most = int((directory / limit).read_text())
            if most < UNLIMITED:
                cache = _statistic(directory / "memory.stat", inactive)  # files that are dropped as memory gets short
                yield max(0, most - int((directory / usage).read_text()) + cache)


def _groups(mount: Path, own: Path, controller: str) -> list[Path]:
    """The directories of this process's group and of those above it; within a container these may be the mount alone."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") if controller else number == "0":
                place = PurePosixPath(path.lstrip("/"))
                return [mount / part for part in (place, *place.parents)]
    return [mount]


def _statistic(file: Path, name: str) -> int:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
