"""The Optuna study of a campaign, brought into line with the ledger whenever it is opened.

The ledger is the truth. A study that a killed driver left behind is rewritten as `search.study_plan` says, so that a
search that was killed proposes what it would have proposed.
"""

import io
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna import Study
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.trial import FrozenTrial

from merging.errors import LedgerError, StorageError
from merging.io import addresses, atomic, storage
from merging.io.process import try_lock
from search.journal import Journal, Lines, appended, whole_lines
from search.ledger.ledger import Ledger
from search.space.search_space import Space
from search.study_plan import CANDIDATE, DUPLICATE, ORIGIN, Wanted, plan, wanted_of

__all__ = ["CANDIDATE", "DUPLICATE", "ORIGIN", "check_storage", "open_study", "read_shared_study", "read_study"]

JOURNAL = "journal.log"
SPACE = "space"
"""User attribute of the study: the fingerprint of the space that its trials agree with."""
OWNER = "mergequest.owner"
"""User attribute of a study in a shared storage: the token of the campaign directory that it belongs to."""
TOKEN = "owner"
"""File of that token, beside the journal's place."""


@contextmanager
def open_study(
    directory: str,
    name: str,
    space: Space,
    ledger: Ledger,
    url: str | None = None,
    *,
    objectives: int = 1,
    split: str = "validation",
) -> Iterator[Study]:
    """The campaign's study, in agreement with its ledger and space, with the space's baselines first.

    Rows that were measured before the search (by a greedy selection, say) are trials before all others, where they
    lie in the space: the sampler learns from them.

    Args:
        directory: Where `journal.log` lies. Of an object store, where nothing can be appended, it is worked on in a
            local copy that is put back at the end, and brought up to the ledger if a killed driver did not.
        name: The campaign's.
        space: What is searched.
        ledger: What has been measured.
        url: An Optuna storage instead of the journal.
        objectives: How many numbers are maximised.
        split: What candidates are measured on.

    Yields:
        The study, to be used by nobody else until the block ends.

    Raises:
        LedgerError: Another process is running this campaign.
        StorageError: The storage cannot be opened, or holds a study of this name that is not this campaign's.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # progress is told by the search's observer
    wanted = wanted_of(ledger, space, objectives, split)
    if url is not None:
        yield _fill(_open_url(url), name, _owner(directory), wanted)
    elif not addresses.is_local(directory):
        kept = addresses.join(directory, JOURNAL)
        with tempfile.TemporaryDirectory(prefix="mergequest-study-") as scratch:
            path = str(Path(scratch) / JOURNAL)
            if storage.exists(kept):
                atomic.write_bytes(path, storage.read_bytes(kept))
            try:
                with _open_journal(path, name, wanted) as study:
                    yield study
            finally:
                with suppress(StorageError):  # the ledger has everything that matters
                    atomic.write_bytes(kept, storage.read_bytes(path))
    else:
        place = addresses.local_path(directory)
        storage.make_dir(directory)
        with (
            _alone(str(place / "driver.lock")),
            _open_journal(str(place / JOURNAL), name, wanted) as study,
        ):
            yield study


def check_storage(url: str, name: str, directory: str) -> None:
    """Checks that an Optuna storage can be opened, and that a study of this name in it is this campaign's.

    A database that does not exist yet is created.

    Args:
        url: The storage.
        name: The campaign's.
        directory: The study's directory, as for `open_study`.

    Raises:
        StorageError: It cannot, or the study is another's.
    """
    _own_study(_open_url(url), name, _token(directory))


def read_shared_study(url: str, name: str, directory: str) -> Study | None:
    """The campaign's study in a shared storage, to look at; None where there is none that is its own.

    Args:
        url: The storage.
        name: The campaign's.
        directory: The study's directory, as for `open_study`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return _own_study(_open_url(url), name, _token(directory))
    except StorageError:
        return None


def read_study(directory: str, name: str) -> Study | None:
    """The study of a directory's journal as it stands, to look at; None where there is none that can be read.

    Args:
        directory: Where `journal.log` lies, local or an address.
        name: The campaign's.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = addresses.join(directory, JOURNAL)
    if not storage.exists(path):
        return None
    text = storage.read_bytes(path).decode(errors="replace")
    try:
        return optuna.load_study(study_name=name, storage=JournalStorage(Lines(text.splitlines())))
    except (KeyError, ValueError):
        return None


def _fill(backend: BaseStorage, name: str, owner: str, wanted: Wanted) -> Study:
    """The study in a shared storage, rewritten there if it is not as planned, and never if it is another's."""
    study = _own_study(backend, name, owner)
    if study is None:
        return _written(backend, name, plan([], wanted), wanted, owner)
    fits = len(study.directions) == wanted.objectives
    trials = study.get_trials(deepcopy=False) if fits else []
    planned = plan(trials, wanted, same_space=_is_of(study, wanted.space))
    if fits and _same(planned, trials):
        return study if _is_of(study, wanted.space) else _marked(study, wanted.space)
    optuna.delete_study(study_name=name, storage=backend)
    return _written(backend, name, planned, wanted, owner)


def _own_study(backend: BaseStorage, name: str, owner: str | None) -> Study | None:
    """The study of that name, if there is one.

    Raises:
        StorageError: There is one, and another campaign or program made it; or the storage does not answer.
    """
    try:
        study = optuna.load_study(study_name=name, storage=backend)
        holder = study.user_attrs.get(OWNER)
    except KeyError:
        return None
    except Exception as error:  # whatever the database's driver raises
        raise StorageError(
            f"the study's storage does not answer ({type(error).__name__}): see search.storage"
        ) from None
    if owner is None or holder != owner:
        raise _not_ours(name)
    return study


def _not_ours(name: str) -> StorageError:
    return StorageError(
        f"search.storage holds a study '{name}' that is not this campaign's, and it is left as it is: give the campaign "
        "another `name`, or another search.storage (the ledger has all that was measured, so nothing is lost)"
    )


def _token(directory: str) -> str | None:
    """The token by which a campaign knows its own study in a shared storage; None before it has one."""
    path = addresses.join(directory, TOKEN)
    return storage.read_bytes(path).decode(errors="replace").strip() if storage.exists(path) else None


def _owner(directory: str) -> str:
    """The campaign's token, made where there is none."""
    if (known := _token(directory)) is not None:
        return known
    token = uuid.uuid4().hex
    atomic.write_bytes(addresses.join(directory, TOKEN), token.encode())
    return token


def _written(
    backend: BaseStorage, name: str, trials: Iterable[FrozenTrial], wanted: Wanted, owner: str | None = None
) -> Study:
    try:
        study = optuna.create_study(study_name=name, storage=backend, directions=["maximize"] * wanted.objectives)
    except DuplicatedStudyError:
        raise _not_ours(name) from None
    if owner is not None:
        study.set_user_attr(OWNER, owner)
    study.add_trials(trials)
    return _marked(study, wanted.space)


def _marked(study: Study, space: Space) -> Study:
    study.set_user_attr(SPACE, space.fingerprint)
    return study


def _is_of(study: Study, space: Space) -> bool:
    return study.user_attrs.get(SPACE) == space.fingerprint


def _same(planned: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> bool:
    return len(planned) == len(trials) and all(new is old for new, old in zip(planned, trials, strict=True))


@contextmanager
def _open_journal(path: str, name: str, wanted: Wanted) -> Iterator[Study]:
    """The study in a journal file, which is replaced in one rename if it is not as planned."""
    with suppress(FileNotFoundError):
        Path(f"{path}.lock").unlink()  # of a killed driver; Optuna would wait half a minute for it
    journal = Journal(io.BytesIO(), whole_lines(path))
    study = _readable(journal, name, wanted.objectives)
    trials = study.get_trials(deepcopy=False) if study else []
    planned = plan(trials, wanted, same_space=study is not None and _is_of(study, wanted.space))
    if study is None or not trials or not _same(planned, trials):
        journal = Journal(made := io.BytesIO())
        study = _written(JournalStorage(journal), name, planned, wanted)
        atomic.write_bytes(path, made.getvalue())
    with appended(path) as journal.file:
        yield study if _is_of(study, wanted.space) else _marked(study, wanted.space)


def _readable(journal: Journal, name: str, objectives: int) -> Study | None:
    """The study in a journal; None where it is damaged, or another study's."""
    try:
        study = optuna.load_study(study_name=name, storage=JournalStorage(journal))
        return study if len(study.directions) == objectives else None
    except Exception:  # whatever a damaged file makes Optuna raise: the ledger has everything that matters
        return None


def _open_url(url: str) -> BaseStorage:
    try:
        return get_storage(url)
    except Exception as error:
        # without the address and the error's own text, which may hold a password
        raise StorageError(
            f"the study's storage cannot be opened ({type(error).__name__}): check its URL, that the server "
            f"answers, and that the database's driver is installed"
        ) from None


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Holds a lock that the operating system gives back when this process ends, however it ends."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    try:
        # where the file system keeps no locks, the campaign's lease keeps others out
        if try_lock(handle) == "taken":
            raise LedgerError(
                f"another process is running this campaign (it holds {path}): wait for it, or stop it first"
            )
        yield
    finally:
        os.close(handle)
