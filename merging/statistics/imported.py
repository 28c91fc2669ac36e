"""Statistics that others published, made ours: names and shapes matched with the checkpoint, values checked, sums divided."""

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.directories.pickles import read_tensors
from merging.checkpoints.formats.safetensors_file import SafetensorsFile
from merging.checkpoints.layout import transposed_weights
from merging.errors import StatisticsError
from merging.io import addresses, hashing
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import IMPORTED, StatisticsFile, expected_shape, problem_of, save_tensors

ImportedKind: TypeAlias = Literal["fisher", "gram", "output_gram"]
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What training programs put before parameters' names."""
SHOWN = 4
NEGATIVE = 1e-6
"""A Gram's diagonal may lie so far below 0, relative to its largest entry, by rounding."""


def import_statistics(
    source: str,
    kind: ImportedKind,
    checkpoint: str,
    out: str,
    *,
    tokens: int,
    examples: int = 0,
    sums: bool = False,
    pickled: bool = False,
) -> StatisticsFile:
    """Writes a statistics file from a file of tensors by parameter or layer name.

    Args:
        source: A safetensors file; a pickle of `torch.save` with `pickled`, read with `weights_only=True`.
        kind: What it holds.
        checkpoint: The checkpoint that it is a statistic of.
        out: The file to write, whole or not at all.
        tokens: Real tokens behind it, or images' patches: what a Gram is a mean over.
        examples: Examples behind it, what a Fisher is a mean over; 0 where nobody knows.
        sums: Whether these are sums over tokens (of a Fisher over examples), to be divided by their number.
        pickled: Whether a pickle is allowed.

    Returns:
        The file, opened and checked.

    Raises:
        StatisticsError: It is a pickle that was not asked for, has no tensor, or one of another name or shape than the
            checkpoint's, or with values that no such statistic has.
        CheckpointError: The checkpoint or the file is damaged.
        StorageError: There is no right or no space to write.
    """
    count = examples if kind == "fisher" else tokens
    if tokens < 1 or examples < 0 or (sums and count < 1):
        what = "examples" if kind == "fisher" and tokens > 0 else "tokens"
        raise StatisticsError(f"the number of {what} behind {source} is {count}: a number from 1 is needed")
    opened = Checkpoint.open(checkpoint)
    turned = transposed_weights(opened)
    imported: dict[str, Tensor] = {}
    for name, value in _tensors(source, pickled).items():
        own = _own_name(name, opened.tensors, kind)
        if own is None:
            raise StatisticsError(
                f"{source}: '{name}' is no matrix of {checkpoint} ({', '.join(list(opened.tensors)[:SHOWN])}, …): name the "
                "checkpoint that it was computed of, or the tensors as that does"
            )
        if own in imported:
            raise StatisticsError(f"{source}: two tensors are the {kind} of '{own}', '{name}' the second of them")
        imported[own] = _checked(source, name, kind, value, opened.tensors[own].shape, own in turned)
        if sums:
            imported[own] /= count
    if not imported:
        raise StatisticsError(f"{source} holds no tensors")
    about = Partial(
        counts={"examples": examples, "tokens": tokens},
        transposed=tuple(sorted(turned & imported.keys())),
        uncovered=tuple(sorted(_matrices(opened) - imported.keys())) if kind != "fisher" else (),
    )
    settings = {"statistic": kind, "version": IMPORTED, "from": addresses.base_name(source), "sums": sums}
    data = f"imported:{hashing.file_fingerprint(source)}"
    return save_tensors(out, kind, settings, imported, about, checkpoint=opened.fingerprint, data=data)


def _tensors(source: str, pickled: bool) -> Mapping[str, Tensor]:
    """A file's tensors by name."""
    if source.endswith(".safetensors"):
        file = SafetensorsFile.open(source)
        return {name: file.read(name) for name in file.tensors}
    if not pickled:
        raise StatisticsError(
            f"{source} is no safetensors file. A pickle of tensors is read only where that is asked for (--pickle), and then "
            "without running what it may hold"
        )
    return read_tensors(source)


def _own_name(name: str, known: Iterable[str], kind: str) -> str | None:
    """The checkpoint's name of what a published name means: a parameter, or the layer that it is the weight of.

    Prefixes of training programs are left out; a prefix that all the checkpoint's names have may be missing.
    """
    names = dict.fromkeys(known)
    for prefix in PREFIXES:
        if name.startswith(prefix) and name not in names and f"{name}.weight" not in names:
            name = name.removeprefix(prefix)
    candidates = [name, f"{name}.weight"] if kind != "fisher" else [name]
    exact = [own for own in candidates if own in names]
    if exact:
        return exact[0]
    ends = [own for own in names for wanted in candidates if own.endswith(f".{wanted}")]
    starts = [own for own in names for wanted in candidates if wanted.endswith(f".{own}")]
    alike = list(dict.fromkeys([*ends, *starts]))
    return alike[0] if len(alike) == 1 else None


def _checked(source: str, name: str, kind: str, value: Tensor, weight: tuple[int, ...], transposed: bool) -> Tensor:
    """A statistic in float32, symmetric to the last bit where it must be.

    Raises:
        StatisticsError: It cannot be one of this weight.
    """
    if not value.is_floating_point():
        raise StatisticsError(f"{source}: '{name}' is {value.dtype}: floating-point numbers are needed")
    shape = tuple(value.shape)
    expected = expected_shape(kind, shape, tuple(weight), transposed=transposed)
    if shape != expected:
        raise StatisticsError(
            f"{source}: '{name}' has shape {list(shape)}, the {kind} of a weight {list(weight)} has {list(expected)}"
        )
    if problem := problem_of(kind, value):
        raise StatisticsError(f"{source}: '{name}' holds {problem}")
    if kind != "fisher":
        value = value.double()
        value = (value + value.mT) / 2
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        if diagonal.numel() and diagonal.min() < -NEGATIVE * diagonal.abs().max():
            raise StatisticsError(f"{source}: '{name}' has negative entries on its diagonal, which no {kind} has")
    return value.to(torch.float32)


def _matrices(checkpoint: Checkpoint) -> set[str]:
    return {name for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
