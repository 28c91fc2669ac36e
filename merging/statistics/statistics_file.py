"""The published form of a statistic: a safetensors file with the member checkpoint's parameter names."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from merging.checkpoints.directories.writer import layout, raw_bytes
from merging.checkpoints.formats.safetensors_file import SafetensorsFile, TensorInfo
from merging.errors import CheckpointError, StatisticsError, StorageError
from merging.io import atomic
from merging.io.documents import as_object, parse_json
from merging.kernels.gram_sketch import diagonal, extents, is_sketch
from merging.statistics.statistic import Partial, Statistic
from merging.versions import code_version

FORMAT = "mergequest.statistics"
VERSION = 1
IMPORTED = "imported"
"""In place of a statistic's own version, of what others computed."""
BLOCK_BYTES = 1 << 26
"""Of a sum that are finalized and written at once, and that travel together."""
SYMMETRY = 1e-4
"""Largest |G − Gᵀ| relative to the largest |G| that rounding explains."""


@dataclass(frozen=True)
class StatisticsFile:
    """A statistics file's header; tensors are read one by one.

    Args:
        path: Its path or address.
        kind: `fisher`, `gram`, `output_gram`, `representation`.
        settings: What it was computed with (`Statistic.key`): kind, version, estimator, ….
        examples: Number of examples behind it.
        tokens: Number of real tokens behind it.
        checkpoint: Fingerprint of the checkpoint that it is a statistic of.
        data: Fingerprint of the examples.
        mergequest: Version of the program that wrote it.
        shared: Name → the name under which the same tensor is stored.
        transposed: Names of weights that are stored [in, out].
        unreached: Names of weights that none of the examples' tokens reached, so that their statistic is 0.
        uncovered: Names of the checkpoint's other matrices that it has no statistic of, though it could be a matrix's.
    """

    path: str
    kind: str
    settings: Mapping[str, Any]
    examples: int
    tokens: int
    checkpoint: str
    data: str
    mergequest: str
    shared: Mapping[str, str]
    transposed: frozenset[str]
    unreached: frozenset[str]
    uncovered: frozenset[str]
    _file: SafetensorsFile = field(repr=False)
    _alive: "WeakValueDictionary[str, Tensor]" = field(default_factory=WeakValueDictionary, repr=False, compare=False)

    @classmethod
    def open(cls, path: str) -> "StatisticsFile":
        """Reads and checks a header.

        Raises:
            StatisticsError: The file is missing, truncated, no statistics file, or of a newer format.
        """
        try:
            file = SafetensorsFile.open(path)
        except CheckpointError as error:
            raise StatisticsError(f"{error}; or compute the statistic again") from error
        about = file.metadata
        if about.get("format") != FORMAT:
            raise StatisticsError(
                f"{path} is no statistics file, though it holds tensors: `mergequest statistics` writes one"
            )
        try:
            if int(about["format_version"]) > VERSION:
                raise StatisticsError(
                    f"{path} has format {about['format_version']}, newer than this program's {VERSION}: "
                    "update mergequest"
                )
            opened = cls(
                path,
                kind=about["kind"],
                settings=as_object(parse_json(about["settings"], "settings"), "settings"),
                examples=int(about["examples"]),
                tokens=int(about["tokens"]),
                checkpoint=about["checkpoint"],
                data=about["data"],
                mergequest=about["mergequest"],
                shared=_names_by_name(parse_json(about["shared"], "shared")),
                transposed=_names(parse_json(about["transposed"], "transposed")),
                unreached=_names(parse_json(about.get("unreached", "[]"), "unreached")),
                uncovered=_names(parse_json(about.get("uncovered", "[]"), "uncovered")),
                _file=file,
            )
            if opened.examples < 0 or opened.tokens < 0:
                raise ValueError("a count below 0")
        except (KeyError, ValueError, TypeError, StorageError) as error:
            raise StatisticsError(
                f"{path} has metadata that cannot be understood ({str(error)[:300]!r}): compute it again"
            ) from error
        if lost := sorted(holder for holder in opened.shared.values() if holder not in file.tensors):
            raise StatisticsError(
                f"{path} says that weights share '{lost[0]}', which it does not hold: compute it again"
            )
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies that travel to other processes open the file there."""
        return StatisticsFile.open, (self.path,)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that `read` knows, those that share a tensor included, sorted."""
        return tuple(sorted({*self._file.tensors, *self.shared}))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it.

        Raises:
            StatisticsError: The file has nothing for that name.
        """
        return self._info(name).shape

    def copy_here(self) -> None:
        """Copies a remote file to this machine, once for all its processes, if there is room; then `read` maps it."""
        self._file.copy_here()

    def prefetch(self, names: Iterable[str]) -> None:
        """Says that these are about to be read, best in this order; names that the file does not know are left out."""
        stored = dict.fromkeys(self.shared.get(name, name) for name in names)
        self._file.prefetch(name for name in stored if name in self._file.tensors and name not in self._alive)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, checked; names that share one get the same object for as long as it is in use.

        Raises:
            StatisticsError: The file has nothing for that name, or what it has is no such statistic: NaN,
                Inf, a negative Fisher entry, a Gram that is not symmetric.
        """
        stored = self._info(name).name
        value = self._alive.get(stored)
        if value is None:
            value = self._file.read(stored)
            self._check_values(stored, value)
            self._alive[stored] = value
        return value

    def check(self, checkpoint: str, tensors: Mapping[str, TensorInfo] | None = None) -> None:
        """Whether these are the statistics of a given checkpoint; costs no reading.

        Args:
            checkpoint: The checkpoint's fingerprint.
            tensors: The checkpoint's tensors, to compare shapes with.

        Raises:
            StatisticsError: They are of another checkpoint, or of other shapes.
        """
        if checkpoint != self.checkpoint:
            raise StatisticsError(
                f"{self.path} is the {self.kind} of another checkpoint (fingerprint {self.checkpoint}, "
                f"the member has {checkpoint}). Name the file that belongs to the member, or compute it again "
                "with `mergequest statistics`"
            )
        if tensors is None or self.kind == "representation":
            return
        for name in self.names:
            if name not in tensors:
                raise StatisticsError(
                    f"{self.path} has a {self.kind} of '{name}', which the checkpoint lacks: compute it again"
                )
            shape, expected = self.shape(name), self._expected(name, tensors[name].shape)
            if shape != expected:
                raise StatisticsError(
                    f"{self.path}: the {self.kind} of '{name}' has shape {list(shape)}, its weight asks for "
                    f"{list(expected)}: compute it again"
                )

    def _info(self, name: str) -> TensorInfo:
        stored = self.shared.get(name, name)
        if stored not in self._file.tensors:
            raise StatisticsError(f"{self.path} has no {self.kind} for '{name}': compute it again")
        return self._file.tensors[stored]

    def _expected(self, name: str, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a weight's statistic must have."""
        stored = self.shape(name)
        expected = expected_shape(self.kind, stored, weight, transposed=name in self.transposed)
        return stored if self.kind == "gram" and len(stored) > 1 and extents(stored) == expected else expected

    def _check_values(self, name: str, value: Tensor) -> None:
        if problem := problem_of(self.kind, value):
            raise StatisticsError(f"{self.path}: '{name}' holds {problem}. The file is damaged: compute it again")


def expected_shape(kind: str, stored: tuple[int, ...], weight: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    """The shape that a weight's statistic must have.

    Args:
        kind: Kind of statistic.
        stored: The shape that it has: three extents are a block for each group or expert.
        weight: The weight's shape.
        transposed: Whether that is [in, out].
    """
    if kind == "fisher":
        return weight
    blocks = stored[0] if len(stored) == 3 else 1
    if len(weight) < 2 or not blocks or weight[0] % blocks:
        return (1, 1)
    if len(weight) == 2 or (len(weight) == 3 and blocks == weight[0]):  # experts, which a convolution's group is not
        inputs, outputs = (-2, -1) if transposed else (-1, -2)
        extent = weight[inputs if kind == "gram" else outputs]
    else:
        extent = math.prod(weight[1:]) if kind == "gram" else weight[0] // blocks
    return (blocks, extent, extent) if len(stored) == 3 else (extent, extent)


def problem_of(kind: str, value: Tensor) -> str | None:
    """Why a tensor cannot be a statistic of a kind, as what it holds; None where it can."""
    if value.is_floating_point() and not value.isfinite().all():
        return "NaN or Inf"
    if kind == "fisher" and (value < 0).any():
        return f"{int((value < 0).sum()):,} negative entries, which no Fisher has"
    if kind == "gram" and is_sketch(value) and min(extents(value.shape)) > 1:
        if (diagonal(value) < 0).any():
            return "a Gram's sketch with negative entries on its diagonal"
        core = value[..., extents(value.shape)[-1] :, :-1]
        return "a Gram's sketch that is not symmetric" if _is_asymmetric(core) else None
    if kind in ("gram", "output_gram"):
        if value.dim() not in (2, 3) or value.shape[-2] != value.shape[-1]:
            return f"shape {list(value.shape)}, which is not square"
        if _is_asymmetric(value):
            return "a matrix that is not symmetric"
    return None


def _is_asymmetric(value: Tensor) -> bool:
    return bool(value.numel() and (value - value.mT).abs().max() > SYMMETRY * value.abs().max())


def save(path: str, statistic: Statistic, partial: Partial, *, checkpoint: str, data: str) -> StatisticsFile:
    """Finalizes a complete sum and writes it block by block, whole or not at all.

    Args:
        path: Where to; a path or address.
        statistic: What was measured.
        partial: All shards, combined.
        checkpoint: Fingerprint of the checkpoint that it was measured of.
        data: Fingerprint of the examples that it was measured on.

    Returns:
        The file, opened.

    Raises:
        StatisticsError: The statistic is over no examples, or holds NaN or Inf.
        StorageError: There is no right or no space to write.
    """
    sums = (partial.block(block) for block in partial.blocks(BLOCK_BYTES))
    return save_blocks(path, statistic, partial.outline(), sums, checkpoint=checkpoint, data=data)


def save_blocks(
    path: str,
    statistic: Statistic,
    outline: Partial,
    sums: Iterable[Mapping[str, Tensor]],
    *,
    checkpoint: str,
    data: str,
) -> StatisticsFile:
    """Finalizes and writes a complete sum that is never whole in one place; the file is there whole, or not at all.

    Args:
        path: Where to; a path or address.
        statistic: What was measured.
        outline: All of the complete sum but its numbers.
        sums: These, block by block, as `outline.blocks(BLOCK_BYTES)` cuts them.
        checkpoint: Fingerprint of the checkpoint that it was measured of.
        data: Fingerprint of the examples that it was measured on.

    Returns:
        The file, opened.

    Raises:
        StatisticsError: The statistic is over no examples, or holds NaN or Inf.
        StorageError: There is no right or no space to write.
    """
    if not outline.sums:
        tensors = statistic.finalize(outline)
        return save_tensors(path, statistic.kind, statistic.key(), tensors, outline, checkpoint=checkpoint, data=data)
    about = _metadata(statistic.kind, statistic.key(), outline, checkpoint, data)
    shapes = [(name, torch.float32, tuple(outline.sums[name].shape)) for name in sorted(outline.sums)]
    with atomic.open_new(path) as file:
        file.write(layout(path, shapes, about).header)
        for block, values in zip(outline.blocks(BLOCK_BYTES), sums, strict=True):
            result = statistic.finalize(outline.of_block(block, values))
            for name, _, _ in block:
                if result[name].shape != values[name].shape or result[name].dtype != torch.float32:
                    raise StatisticsError(f"{statistic.kind}: `finalize` changed the shape or dtype of a sum, '{name}'")
                file.write(raw_bytes(result[name].contiguous()))
    return StatisticsFile.open(path)


def save_tensors(
    path: str,
    kind: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    about: Partial,
    *,
    checkpoint: str,
    data: str,
) -> StatisticsFile:
    """Writes tensors as a statistics file, whole or not at all.

    Args:
        path: Where to; a path or address.
        kind: What they are.
        settings: What they were computed with.
        tensors: By name, on the CPU.
        about: Gives counts, and shared, transposed, unreached and uncovered names.
        checkpoint: Fingerprint of what they are a statistic of.
        data: Fingerprint of the examples.

    Returns:
        The file, opened.

    Raises:
        StorageError: There is no right or no space to write.
    """
    metadata = _metadata(kind, settings, about, checkpoint, data)
    atomic.write_bytes(path, serialize({name: value.contiguous() for name, value in tensors.items()}, metadata))
    return StatisticsFile.open(path)


def _metadata(kind: str, settings: Mapping[str, Any], about: Partial, checkpoint: str, data: str) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": str(VERSION),
        "kind": kind,
        "settings": json.dumps(settings, sort_keys=True),
        "examples": str(about.counts.get("examples", 0)),
        "tokens": str(about.counts.get("tokens", 0)),
        "checkpoint": checkpoint,
        "data": data,
        "mergequest": code_version(),
        "shared": json.dumps(about.shared, sort_keys=True),
        "transposed": json.dumps(sorted(about.transposed)),
        "unreached": json.dumps(sorted(about.unreached)),
        "uncovered": json.dumps(sorted(about.uncovered)),
    }


def _names(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("`transposed` is no list of names")
    return frozenset(value)


def _names_by_name(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise ValueError("`shared` is not a name for each name")
    return value
