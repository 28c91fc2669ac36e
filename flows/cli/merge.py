"""`mergequest merge`: a recipe file in, a Hugging Face directory out."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from flows.config.files_from import notes_on
from flows.config.mergekit import from_mergekit, is_mergekit
from flows.config.recipe_file import RECIPE, RecipeFile, dump_recipe, load_recipe
from flows.config.slices_file import SlicesFile, is_slices, load_slices
from flows.config.yaml_file import load_yaml, parent, require_writable
from flows.directory.progress import Display
from merging.checkpoints.adapters.adapter import model_and_adapter
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.directories.borrowed_files import without_tokenizer
from merging.checkpoints.directories.manifest import require_replaceable
from merging.checkpoints.directories.writer import SHARD_BYTES
from merging.checkpoints.pool import Pool
from merging.errors import SettingsError
from merging.io import addresses
from merging.mergers.adapter_export import write_adapter
from merging.mergers.disk import merge_on_device, merge_to_disk
from merging.mergers.material import Material
from merging.mergers.slices import write_slices
from merging.optimization.gradient_mismatch import quadratic_mismatch, require_fishers
from merging.recipe import Recipe
from merging.registry import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MILLION = 1_000_000
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
"""Suffixes of numbers of parameters."""
BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Output:
    """How a merge is written.

    Args:
        shard_size: Of a file of weights: parameters (`5B`, `500M`) or bytes (`2GB`); None for 4 GiB.
        tokenizer: Whether the tokenizer and chat templates are written too.
        device: Where weights are merged (`cuda`, `cuda:1`, `mps`); None for CPU threads in bounded memory.
    """

    shard_size: str | None = None
    tokenizer: bool = True
    device: str | None = None


def merge_recipe(
    path: str,
    out: str,
    dtype: str | None = None,
    gigabytes: float = 1.0,
    display: Display | None = None,
    mismatch: bool = False,
    threads: int | None = None,
    output: Output | None = None,
) -> None:
    """Merges by a recipe file.

    Args:
        path: The recipe file, or a mergekit configuration, of which one is made.
        out: The directory to write, whole or not at all; an earlier merge that is there is replaced, nothing else.
        dtype: Name of the output dtype; None for the recipe's, or the base's.
        gigabytes: Working memory; local checkpoints are read by memory map, which takes none of it.
        display: Shows progress; by default on standard error.
        mismatch: Also shows the gradient mismatch (with the recipe's own factors) that Fisher information predicts.
        threads: Weights merged side by side; None for as many as there are processors.
        output: How it is written; None for the defaults.

    Raises:
        MergequestError: Something is wrong with the recipe, a checkpoint or a statistic; nothing was written.
    """
    output, display = output or Output(), display or Display()
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"unknown dtype '{dtype}'. {did_you_mean(dtype, list(DTYPES))}")
    shard_size = None if output.shard_size is None else parse_size(output.shard_size)
    device = None if output.device is None else usable_device(output.device)
    slices = is_slices(load_yaml(path))
    if slices and mismatch:
        raise SettingsError(f"{path}: slices have no scaling factors whose mismatch there could be")
    _show_translation(path, display)
    if slices:
        _write_slices(path, out, dtype, shard_size, output.tokenizer, display, threads)
        return
    file = load_recipe(path).pinned()
    dtype = dtype or file.dtype
    recipe = file.recipe()
    _require_free(out, path, file)
    require_writable(out)
    with display.phase(f"Merging {len(file.members)} members by {recipe.method}"):
        material = file.material()
        recipe = material.check(recipe)
        if mismatch:
            require_fishers(material, recipe)
        files = file.files_from.files(material.pool)
        for note in notes_on(material.pool):
            display.note(note)
        if not output.tokenizer:
            files = {**files, **without_tokenizer(material.pool.base)}
        max_shard_bytes = shard_bytes(shard_size, material.pool, dtype)
        members = {name: (member.checkpoint, member.statistics) for name, member in file.members.items()}
        extra = {
            **files,
            RECIPE: dump_recipe(
                file.base,
                members,
                recipe,
                file.statistics,
                base_statistics=file.base_statistics,
                examples=material.examples,
                heads=file.heads,
                vocabulary=file.vocabulary,
                max_distance=file.max_distance,
                files_from=file.files_from,
                dtype=dtype,
                export=file.export,
                directory=out,
            ),
        }
        if file.export == "adapter":
            _write_adapter(material, recipe, out, extra[RECIPE], int(gigabytes * 1e9), threads, display)
            return
        kind = DTYPES[dtype] if dtype else None
        if device is not None:
            report = merge_on_device(
                material, recipe, out, device, dtype=kind, max_shard_bytes=max_shard_bytes, extra=extra
            )
        else:
            with _bar(material.pool, display) as progress:
                report = merge_to_disk(
                    material,
                    recipe,
                    out,
                    dtype=kind,
                    max_bytes=int(gigabytes * 1e9),
                    max_shard_bytes=max_shard_bytes,
                    threads=threads,
                    extra=extra,
                    progress=progress,
                )
        for name, value in report.items():
            if "." not in name:  # of all weights, not of each
                display.note(f"{name}: {value:.3g}")
        if mismatch:
            norms = quadratic_mismatch(material, Checkpoint.open(out).read, recipe)
            terms = ", ".join(f"{member} {norm:.3g}" for member, norm in norms.members.items())
            display.note(f"gradient mismatch, as Fisher information predicts it: {norms.total:.3g} ({terms})")


def _write_adapter(
    material: Material,
    recipe: Recipe,
    out: str,
    text: str | bytes | None,
    max_bytes: int,
    threads: int | None,
    display: Display,
) -> None:
    """Writes a merge of adapters as an adapter: merged to a temporary directory beside it, then weight by weight."""
    parent_directory = addresses.local_path(out).resolve().parent if addresses.is_local(out) else None
    with (
        tempfile.TemporaryDirectory(dir=parent_directory, prefix=".merge-") as place,
        _bar(material.pool, display) as bar,
    ):
        whole = str(Path(place) / "whole")
        merge_to_disk(material, recipe, whole, dtype=torch.float32, max_bytes=max_bytes, threads=threads, progress=bar)
        ranks = write_adapter(material.pool, recipe.members, Checkpoint.open(whole).read, out, {RECIPE: text})
    display.note(f"an adapter of {len(ranks)} weights, ranks {min(ranks.values())} to {max(ranks.values())}")


def parse_size(text: str) -> tuple[int, bool]:
    """A file's size as a user writes it: `5B`, `500M` or `1000` parameters, or `2GB` of bytes.

    Returns:
        The number, and whether it is of bytes.

    Raises:
        SettingsError: It is no such size.
    """
    match = re.fullmatch(r"(\d{1,12})([kmb]|[kmg]b)?", text.strip().lower())
    if not match or not int(match[1]):
        raise SettingsError(
            f"--out-shard-size: '{text}' is no size: write parameters (5B, 500M, 1000) or bytes (2GB, 500MB)"
        )
    unit = match[2] or ""
    return int(match[1]) * {"": 1, **UNITS, **BYTES}[unit], unit in BYTES


def shard_bytes(size: tuple[int, bool] | None, pool: Pool, dtype: str | None) -> int:
    """A file's size in bytes, parameters being of the output's dtype; 4 GiB if none was given."""
    if size is None:
        return SHARD_BYTES
    number, is_bytes = size
    if is_bytes:
        return number
    widths = [DTYPES[dtype].itemsize] if dtype else [info.dtype.itemsize for info in pool.weights.values()]
    return number * max(widths)


def usable_device(name: str) -> torch.device:
    """A device to merge on.

    Raises:
        SettingsError: There is none of this name here.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # of `meta` there are tensors, but no values
    except Exception as error:  # every backend has its own way to say that it is not there
        raise SettingsError(
            f"--device: '{name}' cannot be used here ({str(error).splitlines()[0]}): leave it out to merge on the CPU"
        ) from error
    return device


def _show_translation(path: str, display: Display) -> None:
    """Says what a mergekit configuration becomes."""
    value = load_yaml(path)
    if is_mergekit(value):
        translation = from_mergekit(value, path)
        display.say(f"{path} is mergekit's. As a recipe:\n")
        display.say(yaml.safe_dump(translation.recipe, sort_keys=False, allow_unicode=True))
        for note in translation.notes:
            display.note(note)


@contextmanager
def _bar(pool: Pool, display: Display) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of a pool's parameters are written, as `progress` of what writes them."""
    entries = sum(info.nbytes // info.dtype.itemsize for info in pool.weights.values())
    with display.bar("million parameters", -(-entries // MILLION)) as bar:
        yield lambda done, total: bar.reach(-(-done // MILLION))


def _write_slices(
    path: str,
    out: str,
    dtype: str | None,
    shard_size: tuple[int, bool] | None,
    tokenizer: bool,
    display: Display,
    threads: int | None,
) -> None:
    """Writes the model of a slices file; weights are copied, on no device."""
    file = load_slices(path)
    dtype = dtype or file.dtype
    _require_free(out, path, file)
    require_writable(out)
    with display.phase(f"Taking layers of {len(file.members) + 1} models"):
        pool = file.pool()
        for note in notes_on(pool):
            display.note(note)
        extra = {**file.files_from.files(pool), **({} if tokenizer else without_tokenizer(pool.base))}
        with _bar(pool, display) as progress:
            count = write_slices(
                pool,
                [part.slice() for part in file.slices],
                out,
                rest=file.rest,
                dtype=DTYPES[dtype] if dtype else None,
                max_shard_bytes=shard_bytes(shard_size, pool, dtype),
                threads=threads,
                extra={**extra, RECIPE: file.dump(out)},
                progress=progress,
            )
        display.note(f"{count} layers")


def _require_free(out: str, recipe: str, file: RecipeFile | SlicesFile) -> None:
    """Looks whether something would be lost if the directory were replaced.

    Raises:
        SettingsError: It is or holds what is merged, the recipe, or the working directory.
        StorageError: It holds anything but an earlier merge.
    """
    used = {"the base": [file.base], "the recipe": [parent(recipe)], "a file of statistics": []}
    if isinstance(file, RecipeFile):
        used["a file of statistics"] += (*file.statistics, *file.base_statistics)
    for name, member in file.members.items():
        used[f"member '{name}'"] = [member.checkpoint]
        used["a file of statistics"] += member.statistics
    for what, places in used.items():
        for place in places:
            if any(addresses.contains(out, part) for part in model_and_adapter(place) or (place,)):
                raise SettingsError(f"{out} would replace {place}, where {what} is: name another directory")
    if addresses.contains(out, "."):
        raise SettingsError(f"{out} would replace the directory that this command runs in: name another one")
    require_replaceable(out)
