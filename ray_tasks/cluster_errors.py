"""What went wrong on the cluster, as the error that a user can do something about."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from merging.errors import ClusterError, MergequestError


@contextmanager
def surfaced(doing: str) -> Iterator[None]:
    """Turns Ray's errors within the block into the remote error itself, or one that says what was being done.

    Raises:
        MergequestError: A task or actor raised it.
        ClusterError: A worker was lost more often than it may be.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, MergequestError) else error from None
    except ray.exceptions.GetTimeoutError:
        raise
    except ray.exceptions.RayError as error:
        fewer = isinstance(error, ray.exceptions.OutOfMemoryError)
        remedy = ": set resources.threads higher, so that fewer processes run at once, or a smaller batch size"
        raise ClusterError(f"{doing}: {reason(error)}{remedy * fewer}") from error


def reason(error: ray.exceptions.RayError) -> str:
    """The one line of Ray's message that says why: the last where an actor could not even begin, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if getattr(error, "actor_init_failed", False) else 0].strip()
