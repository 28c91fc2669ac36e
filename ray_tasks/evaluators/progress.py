"""How far evaluators are with what they measure: told through the small values that a cluster's head keeps."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

NAMESPACE = b"mergequest"
EVERY = 2.0
"""Seconds between two words of an evaluator: short candidates cost none."""


def teller(ticket: str) -> Callable[[float], None]:
    """What an evaluator tells the share of an assignment that is done; in a process that is no actor, nobody hears it.

    Args:
        ticket: The assignment's.
    """
    actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    if actor is None:
        return lambda share: None
    last = time.monotonic()

    def tell(share: float) -> None:
        nonlocal last
        if (now := time.monotonic()) - last < EVERY:
            return
        last = now
        with suppress(Exception):  # of Ray's own client: no measurement fails for want of a listener
            _internal_kv_put(actor, f"{ticket} {share:.4f}".encode(), overwrite=True, namespace=NAMESPACE)

    return tell


def share_of(actor: Any, ticket: str) -> float | None:
    """The share of an assignment that is done, as its evaluator said last; None where it said nothing."""
    with suppress(Exception):  # Ray's, which may be ending
        of, _, share = (_internal_kv_get(_name(actor), namespace=NAMESPACE) or b"").decode().partition(" ")
        if of == ticket:
            return float(share)
    return None


def forget(actor: Any) -> None:
    """Takes away what an evaluator said."""
    with suppress(Exception):
        _internal_kv_del(_name(actor), namespace=NAMESPACE)


def _name(actor: Any) -> str:
    return str(actor._actor_id.hex())
