"""`mergequest submit`: a campaign as a job of a Ray cluster, by Ray's own job client."""

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.config import CAMPAIGN_FILE, Campaign, dump, load_campaign, validate
from merging import storage
from merging.errors import ClusterError

AGENT_SECONDS = 60.0
"""A head's dashboard answers some seconds before it takes jobs."""
PACKAGES = ("flows", "merging", "ray_tasks", "search")


def submit(file: str, address: str, out: str | None, follow: bool, candidates: int | None = None) -> int:
    """Sends a campaign to a cluster.

    The job's working directory holds the program and the resolved campaign file, and nothing else: checkpoints, data and
    the campaign's directory stay where they are, and every node must be able to read them there.

    Args:
        file: The campaign file.
        address: The cluster's dashboard (`http://HOST:8265`).
        out: The directory to fill, instead of the file's.
        follow: Print the job's log until it ends.
        candidates: Candidates to evaluate, instead of the file's.

    Returns:
        0 where the job succeeded (or was not followed), 1 where it failed, 130 where it was stopped.

    Raises:
        MergequestError: The file is wrong, or the cluster cannot be reached or refuses the token.
    """
    campaign = load_campaign(file)
    settings = campaign.model_dump(mode="json")
    if out is not None:
        settings["directory"] = storage.absolute(out)
    if candidates is not None:
        settings["search"]["candidates"] = candidates
    campaign = validate(Campaign, settings, file)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except Exception as error:
        raise ClusterError(
            f"cannot reach the Ray cluster at {address}: {_first_line(error)}\nIs its dashboard there (--address "
            "http://HOST:8265), and does RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH hold its token?"
        ) from error
    with tempfile.TemporaryDirectory(prefix="mergequest-") as place:
        pack(campaign, Path(place))
        # The cluster's python runs the code that was sent, whatever version is installed there.
        entrypoint = f"python -u -m flows.cli campaign run {shlex.quote(CAMPAIGN_FILE)}"
        job = _send(client, entrypoint, place)
    print(f"job {job}: {campaign.name} into {campaign.directory}", file=sys.stderr)  # noqa: T201
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        return 130
    status = client.get_job_status(job)
    if status == JobStatus.SUCCEEDED:
        return 0
    return 130 if status == JobStatus.STOPPED else 1


def _send(client: Any, entrypoint: str, place: str) -> str:
    """Submits, and waits for a cluster that is still starting."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": place}))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"the cluster refuses the job: {_first_line(error)}") from error
            time.sleep(1.0)


def pack(campaign: Campaign, place: Path) -> None:
    """Writes what a job needs: the program's packages and the resolved campaign file."""
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
        shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / CAMPAIGN_FILE).write_text(dump(campaign))


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
