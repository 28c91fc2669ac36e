"""Scores by content: what models said of single examples is kept under all that it depends on, and not measured again."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Member
from merging.checkpoints.renumbered import Renumbered
from merging.errors import StorageError
from merging.evaluation.steps import Positions
from merging.io import addresses, atomic, hashing, storage
from merging.io.documents import parse_json
from merging.mergers.dtypes import model_dtype
from merging.mergers.material import Material
from merging.methods import METHODS
from merging.recipe import BASE, REFERENCES, Recipe
from merging.statistics import StatisticsFile
from merging.tasks.predictions import Predictions
from merging.tasks.task import Split
from merging.versions import code_fingerprint, version_of

Arrays = dict[str, npt.NDArray[Any]]

FORMAT = 1
PROGRAMS = ("torch", "transformers")
"""Whose versions may change a score by more than rounding, as may mergequest's own code."""
FIELDS = ("values", "surrogates", "losses", "entropies")
PAYLOAD, TEXTS, REPORT = "payload/", "texts/", "report/"
NUMBERS = "biuf"
"""NumPy's kinds of dtype that a file holds as they are; of `payload`, texts are held besides."""


@dataclass(frozen=True)
class ScoreCache:
    """Where predictions are kept, and what they are kept under. It travels to evaluators, and holds no tensors.

    A key has the recipe, base and members that take part by content, what statistics these bring, the settings that change a
    score, the task by content with its head, and the split. It has no other member of the pool, no path, no seed of a search:
    campaigns over different pools share what they have in common.

    Args:
        directory: A directory, local or at any fsspec address.
        common: Hash of what all candidates depend on.
        members: Member → hash of its weights and configuration.
        statistics: Kind → member, `base`, or names joined by + → hash of the statistic.
        examples: Member, or `base` → number of training examples behind it.
        tasks: Task → split → hash of all that the score depends on besides the merged weights. A task that is not here is
            measured every time.
    """

    directory: str
    common: str
    members: Mapping[str, str]
    statistics: Mapping[str, Mapping[str, str]]
    examples: Mapping[str, int]
    tasks: Mapping[str, Mapping[Split, str]]

    def of(self, recipe: Recipe, split: Split, precision: str) -> "KnownScores":
        """What is kept of a recipe on a split, evaluated in a precision; nothing is read yet."""
        kinds = () if recipe.method in REFERENCES else METHODS[recipe.method].kinds
        who = {BASE, "+".join(recipe.members), *recipe.members}
        statistics = {
            kind: {one: value for one, value in self.statistics[kind].items() if one in who}
            for kind in kinds
            if kind in self.statistics
        }
        merge = [
            self.common,
            precision,
            recipe.as_dict(),
            {member: self.members[member] for member in recipe.members},
            statistics,
            {one: count for one, count in self.examples.items() if one in who},
        ]
        keys = {
            task: hashing.fingerprint([merge, own[split], split]) for task, own in self.tasks.items() if split in own
        }
        return KnownScores({t: addresses.join(self.directory, f"{key}.safetensors") for t, key in keys.items()})


@dataclass(frozen=True)
class _Entry:
    """What one file holds.

    Args:
        positions: Of the examples in the split's fixed order, ascending [N].
        predictions: Of these.
        report: The method's figures on the merge.
    """

    positions: Positions
    predictions: Predictions
    report: Mapping[str, float]


@dataclass
class KnownScores:
    """A candidate's predictions, as far as they were kept, and those to be kept besides.

    Args:
        paths: Task → the file that holds them, or will.
        used: Task → how many predictions were taken from the file.
        problems: What is to be said of files that cannot be read or written.
    """

    paths: Mapping[str, str]
    used: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _entries: dict[str, _Entry | None] = field(default_factory=dict)
    _measured: dict[str, list[tuple[Positions, Predictions]]] = field(default_factory=dict)

    def take(self, task: str, positions: Positions) -> Predictions | None:
        """What is kept of these examples; None unless it is known of all of them."""
        if task not in self.paths:
            return None
        if task not in self._entries:
            self._entries[task] = self._read(self.paths[task])
        entry = self._entries[task]
        if entry is None:
            return None
        places = np.searchsorted(entry.positions, positions).clip(max=len(entry.positions) - 1)
        if not np.array_equal(entry.positions[places], positions):
            return None
        self.used[task] = self.used.get(task, 0) + len(positions)
        return entry.predictions.take(places)

    def add(self, task: str, positions: Positions, predictions: Predictions) -> None:
        """Remembers what was measured, until `keep`."""
        if task in self.paths:
            self._measured.setdefault(task, []).append((positions, predictions))

    @property
    def report(self) -> Mapping[str, float]:
        """The method's figures on the merge, as they were kept with the predictions."""
        return next((entry.report for entry in self._entries.values() if entry is not None), {})

    def keep(self, report: Mapping[str, float]) -> None:
        """Writes what was measured, beside what was kept before; a file is there whole, or not at all."""
        for task, parts in self._measured.items():
            positions = np.concatenate([own for own, _ in parts])
            predictions = [own for _, own in parts]
            if (entry := self._entries.get(task)) is not None:
                rest = np.flatnonzero(~np.isin(entry.positions, positions))
                positions = np.concatenate([positions, entry.positions[rest]])
                predictions.append(entry.predictions.take(rest))
            order = np.argsort(positions)
            content = _encoded(_Entry(positions[order], Predictions.join(predictions).take(order), report))
            if content is None:
                continue
            try:
                atomic.write_bytes(self.paths[task], content)
            except StorageError as error:
                self.problems.append(f"scores cannot be kept: {error}")

    def _read(self, path: str) -> _Entry | None:
        try:
            return _decoded(storage.read_bytes(path))
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                self.problems.append(f"kept scores cannot be read, and are measured again: {error}")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            self.problems.append(f"{path} is damaged ({str(error)[:200]}): its scores are measured again")
        return None


def make_score_cache(
    directory: str,
    material: Material,
    tasks: Mapping[str, Mapping[Split, str]],
    owners: Mapping[str, str],
    *,
    settings: Any,
    published: Collection[str] = (),
) -> ScoreCache:
    """What candidates over a pool are kept under.

    Statistics that mergequest computes go by what they are computed from and with, as they do in their own cache. Files from
    elsewhere, and merges that were trained further, go by all of their bytes.

    Args:
        directory: Where to keep predictions.
        material: Pool, statistics, numbers of examples.
        tasks: Task → split → `Task.score_fingerprint`, of those that have one.
        owners: Task → the member whose head it is evaluated with.
        settings: JSON-like: what changes scores besides (dtype, engine).
        published: Paths of statistics files from elsewhere.

    Raises:
        StorageError: A file cannot be read.
    """
    pool = material.pool
    members = {name: _member_fingerprint(member) for name, member in pool.members.items()}
    weights = [[name, list(info.shape), str(info.dtype)] for name, info in sorted(pool.weights.items())]
    base = _checkpoint_fingerprint(pool.base)
    programs = [code_fingerprint(), {name: version_of(name) for name in PROGRAMS}]
    common = hashing.fingerprint([FORMAT, *programs, base, weights, str(model_dtype(pool)), settings])
    statistics = {
        kind: {who: statistic_fingerprint(file, file.path in published) for who, file in files.items()}
        for kind, files in material.statistics.items()
    }
    with_heads = {
        task: {split: hashing.fingerprint([own, members[owners[task]]]) for split, own in splits.items()}
        for task, splits in tasks.items()
    }
    return ScoreCache(directory, common, members, statistics, dict(material.examples), with_heads)


def _member_fingerprint(member: Member) -> str:
    names = sorted(member.names.items())
    return hashing.fingerprint([_checkpoint_fingerprint(member.checkpoint), names, sorted(member.head)])


def _checkpoint_fingerprint(checkpoint: Checkpoint) -> list[Any]:
    """Weights and configuration; of one whose embeddings get other rows, these too."""
    rows = checkpoint.rows if isinstance(checkpoint, Renumbered) else {}
    moved = {name: hashing.fingerprint(own.index.numpy().tobytes()) for name, own in rows.items()}
    return [checkpoint.fingerprint, checkpoint.config_fingerprint, moved]


def statistic_fingerprint(file: StatisticsFile, published: bool) -> str:
    """What tells a statistics file from others: what it was computed from and with, or, of one from elsewhere, its bytes."""
    content = hashing.file_fingerprint(file.path) if published or "start" in file.settings else None
    return hashing.fingerprint(
        [file.kind, dict(file.settings), file.examples, file.tokens, file.checkpoint, file.data, content]
    )


def _encoded(entry: _Entry) -> bytes | None:
    """A file's bytes; None where a payload is neither numbers nor texts."""
    predictions = entry.predictions
    arrays: Arrays = {"positions": entry.positions}
    arrays |= {name: own for name in FIELDS if (own := getattr(predictions, name)) is not None}
    arrays |= {f"{REPORT}{name}": np.array([value], np.float64) for name, value in entry.report.items()}
    for name, array in predictions.payload.items():
        if array.dtype.kind in NUMBERS:
            arrays[f"{PAYLOAD}{name}"] = array
        elif all(isinstance(text, str) for text in array.tolist()):
            arrays[f"{TEXTS}{name}"] = np.frombuffer(json.dumps(array.tolist(), ensure_ascii=False).encode(), np.uint8)
        else:
            return None
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(save({**arrays, "digest": _digest(arrays)}))


def _decoded(content: bytes) -> _Entry:
    """What a file's bytes hold.

    Raises:
        SafetensorError, KeyError, ValueError, TypeError, StorageError: They are not those that were written.
    """
    arrays: Arrays = load(content)
    if not np.array_equal(arrays.pop("digest"), _digest(arrays)):
        raise ValueError("its bytes are not those that were written")
    payload: Arrays = {}
    for name, array in arrays.items():
        if name.startswith(PAYLOAD):
            payload[name.removeprefix(PAYLOAD)] = array
        elif name.startswith(TEXTS):
            payload[name.removeprefix(TEXTS)] = np.array(parse_json(array.tobytes(), name), object)
    report = {name.removeprefix(REPORT): float(own[0]) for name, own in arrays.items() if name.startswith(REPORT)}
    surrogates, losses, entropies = (arrays.get(name) for name in FIELDS[1:])
    predictions = Predictions(arrays["values"], surrogates, losses, entropies, payload)
    return _Entry(arrays["positions"], predictions, report)


def _digest(arrays: Arrays) -> npt.NDArray[np.uint8]:
    """SHA-256 of arrays with their names, dtypes and shapes."""
    digest = sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode() + array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
