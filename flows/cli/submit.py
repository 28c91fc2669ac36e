"""`mergequest submit`: a campaign, its statistics or a merge as a job of a Ray cluster, by Ray's own job client."""

import ast
import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from flows.campaign.cluster import worker_environment
from flows.config.campaign_file import CAMPAIGN_FILE, Campaign, dump, load_campaign
from flows.config.recipe_file import RECIPE, load_recipe
from flows.config.yaml_file import refuse_secret, validate
from merging.errors import ClusterError, SettingsError
from merging.io import addresses
from merging.io.secrets import redacted
from merging.registry import did_you_mean
from search.samplers.foreign import is_foreign

What = Literal["campaign", "statistics", "merge"]

AGENT_SECONDS = 60.0
"""A head's dashboard answers some seconds before it takes jobs."""
PACKAGES = ("flows", "mergequest", "merging", "ray_tasks", "search")


def submit(
    file: str, address: str, out: str | None, follow: bool, settings: Sequence[str] = (), what: str = "campaign"
) -> int:
    """Sends work to a cluster.

    The job's working directory holds the program, the resolved file and the modules of custom evaluators: checkpoints, data
    and the directory to fill stay where they are, and every node must be able to read them there.

    Args:
        file: The campaign file, or the recipe file of a merge.
        address: The cluster's dashboard (`http://HOST:8265`).
        out: The directory to fill, instead of the file's; a merge needs one.
        follow: Print the job's log until it ends.
        settings: What is set in place of the campaign file's settings, as `search.candidates=200`.
        what: What to do with the file: `campaign`, `statistics` or `merge`.

    Returns:
        0 where the job succeeded (or was not followed), 1 where it failed, 130 where it was stopped.

    Raises:
        MergequestError: The file is wrong, or the cluster cannot be reached or refuses the token.
    """
    job_of = prepare(what, file, out, settings)
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
        pack(job_of, Path(place))
        job = _send(client, job_of, place)
    print(f"job {job}: {job_of.says}", file=sys.stderr)  # noqa: T201
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job))
        status = client.get_job_status(job)
    except KeyboardInterrupt:
        client.stop_job(job)
        return 130
    except Exception as error:
        raise ClusterError(
            f"lost the cluster at {address} while following {job}: {_first_line(error)}\nThe job goes on if its head does: "
            f"`ray job logs --follow {job}`. If not, give the same command again"
        ) from error
    if status == JobStatus.SUCCEEDED:
        return 0
    return 130 if status == JobStatus.STOPPED else 1


@dataclass(frozen=True)
class Submission:
    """What is sent.

    Args:
        command: Of `mergequest`, with its arguments.
        file: Name of the resolved file.
        text: Its content.
        cpus: CPUs that the command itself takes on its node; 0 for a driver that only hands out work.
        says: What it is, for users.
        modules: Files and directories of the user's that go along.
    """

    command: tuple[str, ...]
    file: str
    text: str
    cpus: int
    says: str
    modules: tuple[Path, ...] = ()

    @property
    def entrypoint(self) -> str:
        """The shell's line: the cluster's python runs the code that was sent, whatever version is installed there."""
        return f"python -u -m mergequest {shlex.join(self.command)}"


def prepare(what: str, file: str, out: str | None, settings: Sequence[str] = ()) -> Submission:
    """The job that `submit` sends, with its file resolved.

    Raises:
        MergequestError: The file is wrong, or something is missing or makes no sense with this kind of work.
    """
    if what not in get_args(What):
        raise SettingsError(f"--what: unknown '{what}'. {did_you_mean(what, list(get_args(What)))}")
    if settings and what == "merge":
        raise SettingsError("--set and --candidates go with a campaign file, not with --what merge: leave them out")
    refuse_secret("FILE", file)
    refuse_secret("--out", out or "")
    if what == "merge":
        if out is None:
            raise SettingsError("a merge needs a directory to write: give one that all nodes see with --out")
        recipe, place = load_recipe(file), addresses.absolute(out)
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        # reads and merges on the node itself, which must not be a head that is kept free of work
        return Submission(("merge", RECIPE, "--out", place), RECIPE, text, 1, f"{recipe.method} into {place}")
    resolved = load_campaign(file, settings).model_dump(mode="json")
    modules = modules_of(validate(Campaign, resolved, file))
    resolved["environment"]["working_dir"] = None  # it goes with the job
    if out is not None and what == "campaign":
        resolved["directory"] = addresses.absolute(out)
    campaign = validate(Campaign, resolved, file)
    if what == "campaign":
        says = f"{campaign.name} into {campaign.directory}"
        return Submission(("run", CAMPAIGN_FILE), CAMPAIGN_FILE, dump(campaign), 0, says, modules)
    there = () if out is None else ("--out", addresses.absolute(out))
    return Submission(
        ("statistics", CAMPAIGN_FILE, *there),
        CAMPAIGN_FILE,
        dump(campaign),
        0,
        f"statistics of {campaign.name}",
        modules,
    )


def modules_of(campaign: Campaign) -> tuple[Path, ...]:
    """What of the user's goes along: modules of functions that grade and of a sampler, and what they import from there.

    Of `environment.working_dir`, all.

    Raises:
        SettingsError: That directory is missing, or holds what would hide the program's packages.
    """
    place = worker_environment(campaign, resolve=False).working_dir
    modules = dict.fromkeys(sorted(Path(place).iterdir())) if place is not None else {}
    functions = [
        getattr(task, "evaluator", None) or getattr(task, "function", None) for task in campaign.tasks.values()
    ]
    if is_foreign(campaign.search.sampler):
        functions.append(campaign.search.sampler)
    todo = [name.partition(":")[0] for name in functions if name is not None]
    while todo:
        name = todo.pop().partition(".")[0]
        # an installed module of that name comes first, on the cluster as here
        source = next((path for path in (Path(f"{name}.py"), Path(name)) if path.exists()), None)
        if source is None or source.absolute() in modules or name in PACKAGES or _is_installed(name):
            continue
        modules[source.absolute()] = None
        files = [source] if source.is_file() else sorted(source.rglob("*.py"))
        todo += [imported for file in files for imported in _imports(file)]
    return tuple(modules)


def _is_installed(name: str) -> bool:
    """Whether Python finds a module without looking into the working directory."""
    if name in sys.stdlib_module_names:
        return True
    here = Path.cwd()
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != here.resolve()]
    return PathFinder.find_spec(name, path) is not None


def _imports(file: Path) -> list[str]:
    """The modules that a file imports by name; none of one that is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_text())))
    except (SyntaxError, ValueError, OSError):
        return []
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]


def _send(client: Any, job: Submission, place: str) -> str:
    """Submits, and waits for a cluster that is still starting."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=job.entrypoint,
                    runtime_env={"working_dir": place},
                    entrypoint_num_cpus=job.cpus or None,
                )
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"the cluster refuses the job: {_first_line(error)}") from error
            time.sleep(1.0)


def pack(job: Submission, place: Path) -> None:
    """Writes what a job needs: the program's packages, the resolved file, and the user's own modules."""
    for source in job.modules:
        if source.is_dir():
            shutil.copytree(
                source, place / source.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            shutil.copy(source, place)
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
        shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / job.file).write_text(job.text)


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()


def _first_line(error: BaseException) -> str:
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])
