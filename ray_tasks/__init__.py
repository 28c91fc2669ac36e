"""Work on a Ray cluster. Importing any of it settles what Ray reads from the environment when it is imported."""

import os
import secrets
import sys
from pathlib import Path


def _prepare_environment() -> None:
    """Settles what Ray reads when it is imported: no telemetry, loopback only, and token authentication.

    A cluster that this process starts asks for a token that only its own processes know, unless the user has one. Where
    `RAY_ADDRESS` names a cluster (inside a job, Ray sets it), or this process is connected to one, that cluster's own
    environment stands.
    """
    ray = sys.modules.get("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized()):
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for "other than loopback"
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not known and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if ray is not None:
        ray._raylet.Config.initialize("")  # imported before, it has read them already


_prepare_environment()
