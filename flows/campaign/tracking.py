"""What a team's own tracker is told of a campaign: every row as it comes, the winner's report and recipe at the end.

The ledger is the record; a tracker is a copy of it. It is written by a thread of its own, from the ledger's rows, so that one
that is slow or down costs the search nothing, and catches up when it answers again.
"""

import json
import math
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flows.config.recipe_file import RECIPE
from flows.config.sections import TrackingSettings
from flows.directory.campaign_directory import Directory
from merging.errors import SettingsError, StorageError
from merging.io import addresses, atomic, documents, storage
from merging.io.secrets import described
from search.ledger.row import Row

FILE = "tracking.json"
"""A tracker's run of this campaign, where that is, and how many rows it was told."""
LOOK = 2.0
"""Seconds between two looks at the ledger."""
AGAIN = 20.0
"""Seconds after which a tracker that failed is tried again."""
LAST = 60.0
"""Seconds that trackers have at the end for what they were not told yet."""
INTERRUPTED = 4.0
"""The same where the campaign was interrupted: the user waits, and a resume tells the rest."""
CLOSING = 0.25
"""Share of those seconds that is kept for closing the run, however many rows are left."""
PROJECT = re.compile(r"([\w.-]+/)?(?=\S)[^/\\#?%:]{0,127}[^/\\#?%:\s]")
"""What Weights & Biases takes; its own client looks at less of it while it is offline."""
MOST = 5000
"""Characters of one parameter, below MLflow's own bound."""


class Tracker(Protocol):
    """One of a team's trackers."""

    def begin(self, run: str | None, name: str) -> str:
        """Opens the run of a campaign, or a new one; returns what it is opened by again."""
        ...

    def row(self, number: int, row: Row) -> None:
        """Tells of a row, the `number`-th of its ledger."""
        ...

    def artifact(self, name: str, data: bytes) -> None:
        """Keeps a file."""
        ...

    def end(self, ended: bool) -> None:
        """Closes the run; whether the campaign ended, or only this driver."""
        ...


def require_trackers(settings: TrackingSettings) -> None:
    """Looks whether the packages of the trackers are installed, and whether they can be told of where to write.

    Raises:
        SettingsError: One is not, an experiment has no MLflow, the project is none of Weights & Biases', or a directory of
            TensorBoard's is remote.
    """
    for name in ("mlflow", "wandb", "tensorboard"):
        if getattr(settings, name) is not None and find_spec(name) is None:
            raise SettingsError(f"tracking.{name}: its package is not installed: pip install 'mergequest[{name}]'")
    if settings.experiment is not None and settings.mlflow is None:
        raise SettingsError(
            "tracking.experiment is MLflow's, and there is no tracking.mlflow: leave it out, or name that"
        )
    if settings.wandb is not None and not PROJECT.fullmatch(settings.wandb):
        raise SettingsError(
            f"tracking.wandb: '{settings.wandb}' is no project: expected PROJECT or ENTITY/PROJECT, a project of at most 128 "
            "characters and none of / \\ # ? % : in it"
        )
    if settings.tensorboard is not None and not addresses.is_local(settings.tensorboard):
        raise SettingsError(f"tracking.tensorboard: {settings.tensorboard} is remote; give a local directory")


@contextmanager
def tracked(
    settings: TrackingSettings,
    name: str,
    directory: Directory,
    rows: Callable[[], Sequence[Row]],
    note: Callable[[str], None],
) -> Iterator[None]:
    """Tells the trackers of a campaign what comes into its ledger during the block.

    Args:
        settings: Which trackers.
        name: The campaign's.
        directory: The campaign's.
        rows: The ledger's rows by now.
        note: Told once of each tracker that fails.
    """
    trackers: dict[str, tuple[Tracker, str]] = {}
    if settings.mlflow is not None:
        experiment = settings.experiment or name
        trackers["mlflow"] = MLflow(settings.mlflow, experiment), f"{experiment} at {settings.mlflow}"
    if settings.wandb is not None:
        trackers["wandb"] = WandB(settings.wandb, directory), settings.wandb
    if settings.tensorboard is not None:
        trackers["tensorboard"] = TensorBoard(place := addresses.join(settings.tensorboard, name)), place
    lines = [_Line(key, *tracker, name, directory, rows, note) for key, tracker in trackers.items()]
    for line in lines:
        line.start()
    ended, patience = False, LAST
    try:
        yield
        ended = True
    except BaseException as error:
        patience = LAST if isinstance(error, Exception) else INTERRUPTED
        raise
    finally:
        deadline = time.monotonic() + patience
        for line in lines:
            line.finish(ended, deadline - CLOSING * patience)
        for line in lines:
            line.join(max(0.0, deadline - time.monotonic()))
            if line.is_alive() or line.sent < len(rows()):
                missing = f"tracking.{line.key}: {len(rows()) - line.sent} rows are not there"
                note(f"{missing}; the ledger has them all{'' if ended else ', and a resume sends them'}")


class _Line(threading.Thread):
    """A tracker's thread."""

    def __init__(
        self,
        key: str,
        tracker: Tracker,
        place: str,
        campaign: str,
        directory: Directory,
        rows: Callable[[], Sequence[Row]],
        note: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"mergequest-{key}", daemon=True)
        self.key, self.sent, self._place = key, 0, place
        self._tracker, self._campaign, self._directory, self._rows, self._note = (
            tracker,
            campaign,
            directory,
            rows,
            note,
        )
        self._done, self._ended, self._warned, self._begun = threading.Event(), False, False, False
        self._until = math.inf

    def finish(self, ended: bool, until: float) -> None:
        """Has the thread tell what is left, until a moment of the monotonic clock, and end."""
        self._ended, self._until = ended, until
        self._done.set()

    def run(self) -> None:
        """Tells rows as they come; once more of all of them at the end."""
        while True:
            last = self._done.is_set()
            works = self._works(self._tell)
            if last:
                if works:
                    self._works(self._close)
                return
            self._done.wait(LOOK if works else AGAIN)

    def _works(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a tracker's own client raises: the campaign goes on
            if not self._warned:
                self._warned = True
                self._note(f"tracking.{self.key} fails, and the campaign goes on without: {described(error, 300)}")
            return False
        return True

    def _tell(self) -> None:
        path = self._directory / f".{self.key}-{FILE}"
        if not self._begun:
            known = documents.read_object(path) if storage.exists(path) else {}
            if known.get("place", self._place) != self._place:
                known = {}  # another server, project or directory, which knows nothing of that run
            run = known.get("run")
            self._run = self._tracker.begin(None if run is None else str(run), self._campaign)
            self.sent = int(known.get("sent", 0))
            self._begun = True
            self._note_down(path)
        rows = self._rows()
        if self.sent >= len(rows):
            return
        try:
            for number in range(self.sent, len(rows)):
                if time.monotonic() > self._until:
                    return
                self._tracker.row(number, rows[number])
                self.sent = number + 1
        finally:
            self._note_down(path)

    def _note_down(self, path: str) -> None:
        atomic.write_json(path, {"run": self._run, "place": self._place, "sent": self.sent})

    def _close(self) -> None:
        if self._ended:
            for name, path in (
                ("report.html", self._directory.report),
                (RECIPE, addresses.join(self._directory.best, RECIPE)),
            ):
                with suppress(StorageError):
                    self._tracker.artifact(name, storage.read_bytes(path))
        self._tracker.end(self._ended)


def figures(row: Row) -> dict[str, float]:
    """A row's numbers by name, without those that are missing or not finite."""
    plain = {
        "objective": row.objective,
        "merge_seconds": row.merge_seconds,
        "evaluate_seconds": row.evaluate_seconds,
        "cpu_hours": row.cpu_hours,
        "gpu_hours": row.gpu_hours,
    }
    maps: dict[str, Mapping[str, float]] = {
        "score": row.scores,
        "standard_error": row.standard_errors,
        "loss": row.losses,
        "objectives": row.objectives,
    }
    spread = {f"{kind}/{name}": value for kind, values in maps.items() for name, value in values.items()}
    return {
        re.sub(r"[^\w./ -]", "_", name): float(value)
        for name, value in (plain | spread).items()
        if value is not None and math.isfinite(value)
    }


def words(row: Row) -> dict[str, str]:
    """What a row says of its candidate, as texts."""
    return {
        "candidate": row.candidate,
        "split": row.split,
        "origin": row.origin,
        "status": row.status,
        "method": row.method,
        "members": ", ".join(row.members)[:MOST],
        "scaling": json.dumps(dict(row.scaling), sort_keys=True)[:MOST],
        "parameters": json.dumps(dict(row.parameters), sort_keys=True)[:MOST],
    }


class MLflow:
    """A run of the campaign, and below it one of every row.

    Args:
        uri: Of the tracking server, or a directory.
        experiment: Its experiment.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri, self._experiment = uri, experiment
        # MLflow's own would try for minutes; this thread tries again by itself
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        if addresses.is_local(uri):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

    def begin(self, run: str | None, name: str) -> str:
        """Finds or makes experiment and run, and which rows are there already."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        experiment = self._client.get_experiment_by_name(self._experiment)
        self._id = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        self._run = (
            run or self._client.create_run(self._id, run_name=name, tags={"mergequest.campaign": name}).info.run_id
        )
        if run is not None:
            self._client.update_run(run, status="RUNNING")
        self._there = {} if run is None else self._known()
        return str(self._run)

    def row(self, number: int, row: Row) -> None:
        """A run below the campaign's."""
        if (key := f"{row.candidate}-{row.split}-{row.started.isoformat()}") in self._there:
            return
        from mlflow.entities import Metric, Param, RunTag

        tags = {"mlflow.parentRunId": self._run, "mergequest.row": key, "mlflow.runName": f"{number} {row.method}"}
        start, end = (int(moment.timestamp() * 1000) for moment in (row.started, row.finished))
        run = self._client.create_run(self._id, start_time=start, tags=tags).info.run_id
        metrics = [Metric(name, value, end, 0) for name, value in figures(row).items()]
        params = [Param(name, text) for name, text in words(row).items()]
        more = [RunTag("error", row.error[:MOST])] if row.error else []
        self._client.log_batch(run, metrics, params, more)
        self._client.set_terminated(run, "FAILED" if row.status == "failed" else "FINISHED", end)
        if row.objective is not None:
            self._client.log_metric(self._run, "objective", row.objective, end, number)

    def artifact(self, name: str, data: bytes) -> None:
        """A file of the campaign's run."""
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / name).write_bytes(data)
            self._client.log_artifact(self._run, str(Path(place) / name))

    def end(self, ended: bool) -> None:
        """Ends the campaign's run, or says that it may go on."""
        self._client.set_terminated(self._run, "FINISHED" if ended else "KILLED")

    def _known(self) -> dict[str, None]:
        known: dict[str, None] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._id], f"tags.`mlflow.parentRunId` = '{self._run}'", max_results=1000, page_token=token
            )
            known |= {run.data.tags.get("mergequest.row", ""): None for run in page}
            if not (token := page.token):
                return known


class WandB:
    """A run with a step for every row.

    Args:
        project: `PROJECT` or `ENTITY/PROJECT`.
        directory: The campaign's.
    """

    def __init__(self, project: str, directory: Directory) -> None:
        self._entity, _, self._project = project.rpartition("/")
        self._place = addresses.local_path(directory.path) if addresses.is_local(directory.path) else None

    def begin(self, run: str | None, name: str) -> str:
        """Opens the run, which WANDB_MODE=offline keeps in `wandb/` of the campaign's directory."""
        import wandb

        # else its own exit hook waits for a server that does not answer; what was not sent stays in its directory
        bounds = {"finish_timeout": INTERRUPTED} if "finish_timeout" in wandb.Settings.model_fields else {}
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
            raise SettingsError("no key: set WANDB_API_KEY or `wandb login`, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=self._project,
            entity=self._entity or None,
            id=run or uuid.uuid4().hex[:12],
            resume="allow",
            name=name,
            dir=self._place,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=True, **bounds),
        )
        return str(self._run.id)

    def row(self, number: int, row: Row) -> None:
        """A step of the run."""
        self._run.log({**figures(row), **words(row)}, step=number)

    def artifact(self, name: str, data: bytes) -> None:
        """A file of the run."""
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-{name.partition('.')[0]}", "winner")
        with artifact.new_file(name, "wb") as file:
            file.write(data)
        self._run.log_artifact(artifact)
        if not self._run.offline:
            artifact.wait(int(LAST))

    def end(self, ended: bool) -> None:
        """Closes the run."""
        self._run.finish(0 if ended else 1)


class TensorBoard:
    """Scalars by row, and the winner's recipe as text.

    Args:
        directory: Where event files go.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def begin(self, run: str | None, name: str) -> str:
        """Opens a file of events."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(addresses.local_path(self._directory)))
        return self._directory

    def row(self, number: int, row: Row) -> None:
        """A step of every scalar."""
        writer: Any = self._writer
        for name, value in figures(row).items():
            writer.add_scalar(f"{row.split}/{name}", value, number)
        writer.add_text("candidate", json.dumps(words(row)), number)
        writer.flush()

    def artifact(self, name: str, data: bytes) -> None:
        """A text; pages do not go there."""
        if name == RECIPE:
            writer: Any = self._writer
            writer.add_text("winner", f"```yaml\n{data.decode()}\n```")

    def end(self, ended: bool) -> None:
        """Closes the file."""
        writer: Any = self._writer
        writer.close()
