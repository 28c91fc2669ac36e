"""One driver at a time where no operating system keeps a lock: a small object, renewed while its holder lives."""

import json
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from merging.errors import LedgerError, StorageError
from merging.io import atomic, documents, storage
from merging.io.process import is_gone, this_process

BEAT = 10.0
"""Seconds between two signs of life."""
SILENCE = 3 * BEAT
"""A holder that gave none for so long is taken for dead."""
SETTLE = 1.0
"""Seconds after which of several that took a dead holder's place on a store without conditions, the last one stays."""
TAKEN = signal.SIGUSR1
"""Interrupts the main thread, also of a process that was started in the background, where SIGINT is ignored."""


class _Taken(BaseException):
    """Somebody else holds the lease now."""


@contextmanager
def lease(path: str, what: str) -> Iterator[None]:
    """Holds the lease at `path` for the block; ends the block when somebody else took it meanwhile.

    A holder that was killed is noticed at once on its own machine and in its own container, and elsewhere by its
    silence: no clocks are compared, the object is watched for `SILENCE` seconds.

    Args:
        path: Address of the object.
        what: What is held, for messages.

    Raises:
        LedgerError: Somebody else holds it, or took it while this process did not run.
        StorageError: There is no right to write there.
    """
    mine = {"owner": uuid.uuid4().hex, **this_process()}
    _take(path, mine, what)
    done, lost = threading.Event(), threading.Event()
    beats = threading.Thread(target=_beat, args=(path, mine, done, lost), name="mergequest-lease", daemon=True)
    before = signal.signal(TAKEN, _stop)
    beats.start()
    try:
        yield
    except _Taken:
        raise LedgerError(
            f"another mergequest took over {what} while this one gave no sign of life: it goes on there"
        ) from None
    finally:
        done.set()
        beats.join()
        signal.signal(TAKEN, before)
        if not lost.is_set():
            with suppress(StorageError):
                storage.remove(path)


def _stop(number: int, frame: object) -> None:
    raise _Taken


def _take(path: str, mine: dict[str, Any], what: str) -> None:
    """Becomes the holder."""
    if atomic.create(path, _encoded(mine, 0)):
        return
    holder = _read(path)
    if holder is not None and not is_gone(holder):
        seen, until = holder, time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(BEAT / 10, 1.0))
            holder = _read(path)
            if holder is None:
                break
            if holder != seen:
                raise LedgerError(
                    f"another mergequest is running {what}: process {holder.get('pid')} on {holder.get('host')}. Wait for it, "
                    "or stop it there"
                )
    with suppress(StorageError):
        storage.remove(path)
    if not atomic.create(path, _encoded(mine, 0)):
        raise LedgerError(f"another mergequest has just started {what}: wait for it, or stop it")
    time.sleep(SETTLE)
    if (_read(path) or {}).get("owner") != mine["owner"]:
        raise LedgerError(f"another mergequest has just started {what}: wait for it, or stop it")


def _beat(path: str, mine: dict[str, Any], done: threading.Event, lost: threading.Event) -> None:
    """Gives signs of life until `done`; interrupts the main thread when the lease is somebody else's."""
    number = 0
    while not done.wait(BEAT):
        number += 1
        try:
            holder = _read(path)
            if holder is not None and holder.get("owner") != mine["owner"]:
                lost.set()
                signal.pthread_kill(threading.main_thread().ident or 0, TAKEN)
                return
            atomic.write_bytes(path, _encoded(mine, number))
        except Exception:  # whatever a store's client raises: without this thread the lease would run out unnoticed
            continue  # the store is away: whoever comes back first finds out


def _read(path: str) -> dict[str, Any] | None:
    """What the lease says; None where there is none."""
    try:
        holder = documents.read_json(path)
    except StorageError:
        if storage.exists(path):
            raise
        return None
    return holder if isinstance(holder, dict) else {}


def _encoded(mine: dict[str, Any], beat: int) -> bytes:
    return json.dumps(mine | {"beat": beat}).encode()
