"""From a pool and a recipe to a merged checkpoint on disk, within bounded memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from merging.checkpoint import write_checkpoint
from merging.merge import Material
from merging.methods import METHODS
from merging.pool import Pool
from merging.recipe import Recipe


def partition(pool: Pool, max_bytes: int) -> list[list[str]]:
    """The merged weights in file order, cut so that base and members of a part stay below `max_bytes` in float32."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, info in pool.weights.items():
        need = int(torch.Size(info.shape).numel()) * 4 * (len(pool.members) + 1)
        if parts[-1] and filled + need > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += need
    return parts


def merge_to_disk(
    material: Material,
    recipe: Recipe,
    path: str,
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int = 1 << 30,
    extra: Mapping[str, str | bytes] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Writes the merged model as a Hugging Face directory like the base's, whole or not at all.

    Args:
        material: Pool and statistics.
        recipe: What to merge.
        path: The directory to write; replaced if it exists.
        dtype: Of the merged weights; the base's by default.
        max_bytes: Float32 bytes of base and members that are held at once; also bounds an output file.
        extra: Further small files, by their path below the directory.
        progress: Told how many of how many tensors are merged.

    Returns:
        The method's figures on this merge.

    Raises:
        MethodError: The recipe is wrong, or has no merge; nothing is written.
        StorageError: There is no right or no space to write.
    """
    complete = material.check(recipe)
    report: dict[str, float] = {}
    merged = _merged(material, complete, dtype, max_bytes, report, progress)
    write_checkpoint(path, merged, like=material.pool.base, max_shard_bytes=max(max_bytes, 1 << 30), extra=extra)
    return report


def _merged(
    material: Material,
    recipe: Recipe,
    dtype: torch.dtype | None,
    max_bytes: int,
    report: dict[str, float],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the merged checkpoint, part by part; what is not merged comes from the base."""
    pool = material.pool
    parts = partition(pool, max_bytes)
    method = METHODS[recipe.method]
    survey = None
    for number, part in enumerate(parts):
        found = material.survey(part, method)
        survey = found if number == 0 else method.combine(survey, found)
    done = 0
    for part in parts:
        prepared = material.prepare(part, method, survey, torch.device("cpu"))
        out = {name: torch.empty(pool.weights[name].shape, dtype=dtype or pool.weights[name].dtype) for name in part}
        prepared.merge(recipe.scaling, recipe.parameters, out)
        for name, value in prepared.report().items():
            report[name] = max(value, report.get(name, value))
        yield from out.items()
        done += len(part)
        progress(done, len(pool.weights))
    for name in pool.base.tensors:
        if name not in pool.weights:
            yield name, pool.base.read(name)
