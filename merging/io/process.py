"""Which process this is, told from those of other machines and containers; and locks that die with it."""

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil


def this_process() -> dict[str, Any]:
    """Host, start of its system, namespace of process numbers, number and start of this process; JSON-like.

    Two containers may share a host name and have processes of the same number: only with the same boot and the same
    namespace does a number mean the same process.
    """
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), **_place()}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process, as `this_process` described it, is known to be no more; False where it cannot be seen from here."""
    here = {"host": socket.gethostname(), **_place()}
    if any(process.get(key) != value for key, value in here.items()) or not here["boot"]:
        return False
    pid = process.get("pid")
    return isinstance(pid, int) and pid > 0 and _born(pid) != process.get("born")


def try_lock(handle: int) -> Literal["held", "taken", "unsupported"]:
    """Takes the operating system's lock of an open file, unless another process has it.

    Returns:
        `unsupported` where the file system keeps no locks (some mounts of Lustre, NFS and FUSE).
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "taken"
    except OSError as error:
        return "taken" if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK) else "unsupported"
    return "held"


@cache
def _place() -> dict[str, str]:
    """What process numbers are relative to; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": str(Path("/proc/self/ns/pid").readlink())}
    except OSError:  # no Linux, where processes have one namespace
        return {"boot": f"{psutil.boot_time():.0f}", "namespace": ""}


def _born(pid: int) -> float | None:
    """When a process that can be seen from here started, which tells it from another of its number."""
    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None
