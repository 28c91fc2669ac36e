"""What a campaign leaves behind, and where; one campaign a directory, one driver at a time."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from shlex import quote
from typing import Any

from flows.config.campaign_file import CAMPAIGN_FILE, Campaign, dump, load_campaign
from flows.config.search_settings import SearchSettings
from flows.config.sections import TestSettings
from flows.config.yaml_file import require_writable
from flows.directory.heartbeat import FILE as PULSE
from flows.directory.lock import lease
from merging.checkpoints.formats.config_checks import check_config
from merging.checkpoints.formats.configuration import differences
from merging.checkpoints.formats.safetensors_header import MAX_TENSORS
from merging.errors import LedgerError, PoolError, SettingsError, StorageError, TaskError
from merging.io import addresses, atomic, documents, storage
from merging.io.process import try_lock
from search.ledger.ledger import Ledger


@dataclass(frozen=True)
class Directory:
    """A campaign's directory.

    Args:
        path: Local, or an fsspec address.
    """

    path: str

    def __truediv__(self, name: str) -> str:
        return addresses.join(self.path, name)

    @property
    def ledger(self) -> str:
        """The Parquet dataset."""
        return self / "ledger"

    @property
    def test_predictions(self) -> str:
        """What models said of single test examples."""
        return self / "outcomes"

    @property
    def validation_predictions(self) -> str:
        """What candidates said of single validation examples."""
        return self / "outcomes-validation"

    @property
    def best(self) -> str:
        """The exported winner."""
        return self.exported("best")

    def exported(self, name: str) -> str:
        """An exported candidate."""
        return addresses.join(self.path, "exports", name)

    @property
    def report(self) -> str:
        """The HTML report."""
        return self / "report.html"

    def campaign(self) -> Campaign:
        """The campaign that this directory holds, as it was resolved.

        Raises:
            SettingsError: It holds none.
        """
        if not storage.exists(self / CAMPAIGN_FILE):
            raise SettingsError(f"{self.path} holds no campaign (no {CAMPAIGN_FILE}): start one with `mergequest run`")
        return load_campaign(self / CAMPAIGN_FILE)

    def check(self, campaign: Campaign) -> None:
        """Looks whether this can be the campaign's directory.

        Raises:
            LedgerError: It holds measurements of another campaign, or other things.
            SettingsError: It cannot be written, or would vanish with the job that this process runs in.
        """
        if "/runtime_resources/" in self.path:
            raise SettingsError(
                f"{self.path} lies in the job's temporary working directory and would vanish with it: give an absolute path "
                "that all nodes see, or an s3:// address, with --out or as the file's `directory`"
            )
        require_writable(self.path)
        if storage.exists(self / CAMPAIGN_FILE):
            there = self.campaign()
            if there.identity() != campaign.identity() and not self._may_become(there, campaign):
                changed = ", ".join(_differences(there, campaign))
                raise LedgerError(
                    f"{self.path} holds another campaign ('{there.name}'; it differs in {changed}). Choose another directory "
                    f"with --out, or go on with that one: mergequest resume {quote(self.path)}"
                )
        elif [name for name in storage.list_dir(self.path) if not name.startswith(".") and name not in KNOWN]:
            raise LedgerError(f"{self.path} is not empty and holds no campaign: choose another directory with --out")

    def _may_become(self, there: Campaign, campaign: Campaign) -> bool:
        """Whether nothing was measured yet that a corrected file contradicts: base and members say nothing of a selection."""
        if not storage.list_dir(self.ledger):
            return True
        rows = Ledger(self.ledger, there.name).rows()
        return _differences(there, campaign) == ["selection"] and all(row.origin == "reference" for row in rows)

    def check_pool(self, facts: Mapping[str, Any]) -> None:
        """Looks whether base, members and evaluation data are those that the ledger's scores were measured on.

        Args:
            facts: `OpenCampaign.fingerprints` of what is there now.

        Raises:
            PoolError: A checkpoint has changed since.
            TaskError: A task's data have.
        """
        if not storage.exists(self / POOL) or not storage.list_dir(self.ledger):
            return
        before = documents.read_as(self / POOL, _fingerprints)
        remedy = "Put back what was there, or run the campaign anew in another directory"
        for name, checkpoint in facts["checkpoints"].items():
            if before["checkpoints"].get(name) != checkpoint:
                raise PoolError(
                    f"'{name}' is not the checkpoint that this campaign was run on: its scores say nothing of the one that is "
                    f"there now. {remedy}"
                )
        for name, config in facts["configurations"].items():
            known = before.get("configurations", {}).get(name)
            for field, one, other in differences(known, config) if known is not None else ():
                raise PoolError(
                    f"'{name}': config.json has {field} = {other!r}, and had {one!r} when this campaign was run: its scores "
                    f"say nothing of the model that is there now. {remedy}"
                )
        for task, splits in facts["data"].items():
            for split, examples in splits.items():
                if before["data"].get(task, {}).get(split) != examples:
                    raise TaskError(
                        f"task '{task}': the {split} examples are not those that this campaign was measured on, and scores on "
                        f"both cannot be compared. {remedy}"
                    )

    def claim(self, campaign: Campaign, pool: Mapping[str, Any]) -> None:
        """Keeps the resolved campaign file and the pool's fingerprints, which makes this the campaign's directory."""
        atomic.write_text(self / CAMPAIGN_FILE, dump(campaign))
        atomic.write_json(self / POOL, dict(pool))

    def precision(self) -> str:
        """What an automatic choice of the evaluations' precision came to, in words; empty where there was none."""
        path = self / PRECISION
        return documents.read_as(path, lambda value: str(value["why"])) if storage.exists(path) else ""

    def metrics(self) -> dict[str, str]:
        """Task → its metric's name, where the campaign was opened once."""
        return documents.read_as(self / POOL, _metrics) if storage.exists(self / POOL) else {}

    def is_finished(self, campaign: Campaign) -> bool:
        """Whether this very budget was spent here, and what it led to is still there."""
        places = (self / CAMPAIGN_FILE, self / DONE, self.report, addresses.join(self.best, "config.json"))
        if not all(map(storage.exists, places)) or self.campaign().identity() != campaign.identity():
            return False
        spent = _spent(documents.read_json(self / DONE))
        return spent is not None and all(spent.get(name, UNSPENT[name]) == v for name, v in _budget(campaign).items())

    def finish(self, campaign: Campaign) -> None:
        """Notes that the campaign's budget is spent, and its winner exported."""
        atomic.write_json(self / DONE, _budget(campaign))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other drivers out of this directory for the block; the lock dies with its process.

        Raises:
            LedgerError: Another driver is at work here.
            StorageError: There is no right to write here.
        """
        if addresses.is_local(self.path):
            storage.make_dir(self.path)
            try:
                handle = os.open(addresses.local_path(self / ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise StorageError(f"cannot write {self / '.lock'}: {error.strerror}") from error
            try:
                state = try_lock(handle)
                if state == "taken":
                    raise LedgerError(
                        f"another mergequest is running this campaign ({self.path}): wait for it, or stop it"
                    )
                if state == "held":
                    yield
                    return
            finally:
                os.close(handle)
        with lease(self / LEASE, f"this campaign ({self.path})"):  # an object store, or a file system without locks
            yield

    def read_timings(self) -> dict[str, float]:
        """Phase → seconds over all runs so far."""
        try:
            return documents.read_as(self / "timings.json", _seconds)
        except StorageError:
            return {}

    def write_timings(self, timings: dict[str, float]) -> None:
        """Keeps the seconds of each phase."""
        atomic.write_json(self / "timings.json", {name: round(value, 3) for name, value in timings.items()})


DONE = "done.json"
LISTED = ("candidates", "seconds", "top", "budget_examples", "patience", "min_delta", "confirm")
"""The budget in the order in which early versions wrote it."""
UNSPENT: Mapping[str, Any] = {
    **{
        name: SearchSettings.model_fields[name].default for name in (*LISTED, "gpu_hours", "cpu_hours") if name != "top"
    },
    "top": TestSettings.model_fields["top"].default,
    "baselines": [],
}
"""What a budget is that a file says nothing of: the version that wrote it did not know the setting."""
LEASE = ".lease.json"
POOL = "pool.json"
PRECISION = "precision.json"
"""What `resources.precision: auto` came to."""
FACTS = "facts.json"
"""What reading every weight of the pool told."""
KNOWN = ("members", "data", "statistics", FACTS, PULSE)
"""What may lie in a directory before its campaign does: the quick start's pool, and statistics computed ahead."""


def known_revisions(path: str) -> dict[str, str]:
    """Checkpoint on the Hub → with its commit, as `pool.json` of a campaign's directory has it; empty where it has none."""
    if not storage.exists(pool := addresses.join(path, POOL)):
        return {}
    return documents.read_as(pool, lambda value: {str(k): str(v) for k, v in value.get("revisions", {}).items()})


def is_same_checkpoint(one: str, other: str, revisions: Mapping[str, str]) -> bool:
    """Whether two paths name one checkpoint, given the commits that those on the Hub stand for (`known_revisions`)."""
    return revisions.get(one, one) == revisions.get(other, other)


def begun_directory(campaign: Campaign) -> Directory | None:
    """The campaign's directory, if that holds what this very campaign has done so far."""
    directory = Directory(campaign.directory) if campaign.directory else None
    if directory is None or not storage.exists(directory / CAMPAIGN_FILE):
        return None
    return directory if directory.campaign().identity() == campaign.identity() else None


def _fingerprints(value: Any) -> dict[str, Any]:
    """`pool.json`."""
    data = {str(task): dict(splits) for task, splits in value["data"].items()}
    configurations = {str(name): dict(config) for name, config in value.get("configurations", {}).items()}
    for name, config in configurations.items():
        check_config(config, MAX_TENSORS, name)
    return {"checkpoints": dict(value["checkpoints"]), "data": data, "configurations": configurations}


def _metrics(value: Any) -> dict[str, str]:
    """The metrics in `pool.json`."""
    return {str(task): str(metric) for task, metric in value.get("metrics", {}).items()}


def _seconds(value: Any) -> dict[str, float]:
    """`timings.json`."""
    return {str(phase): float(seconds) for phase, seconds in value.items()}


def _budget(campaign: Campaign) -> dict[str, Any]:
    """What a finished campaign has spent; with more of it, there is more to do."""
    search = campaign.search.model_dump(mode="json", include=set(UNSPENT))
    return {**search, "top": campaign.test.top, "baselines": list(campaign.baselines)}


def _spent(value: Any) -> dict[str, Any] | None:
    """`done.json`: a budget by name; None where it holds something else.

    Early versions wrote a list: a hash of all settings, which those that a later version adds change, and these.
    """
    if not isinstance(value, list) or len(value) < len(LISTED):
        return value if isinstance(value, dict) else None
    budget, rest = dict(zip(LISTED, value[1:], strict=False)), value[len(LISTED) + 1 :]
    baselines = [entry for entry in rest if isinstance(entry, str)]
    hours = rest[: len(rest) - len(baselines)]
    return {**budget, **dict(zip(("gpu_hours", "cpu_hours"), hours, strict=False)), "baselines": baselines}


def _differences(one: Campaign, other: Campaign) -> list[str]:
    """The top-level settings in which two campaigns differ, but for what may differ from run to run."""
    first, second = one.lasting(), other.lasting()
    return sorted(key for key in {**first, **second} if first.get(key) != second.get(key))
