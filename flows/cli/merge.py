"""`mergequest merge`: a recipe file in, a Hugging Face directory out."""

import torch

from flows.config.recipe_file import RECIPE, RecipeFile, dump_recipe, load_recipe
from flows.config.yaml_file import parent, require_writable
from flows.directory.progress import Display
from merging.checkpoints.borrowed_files import notes_on_files
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.manifest import require_replaceable
from merging.errors import SettingsError
from merging.io import storage
from merging.mergers.disk import merge_to_disk
from merging.optimization.gradient_mismatch import quadratic_mismatch, require_fishers
from merging.registry import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MILLION = 1_000_000


def merge_recipe(
    path: str,
    out: str,
    dtype: str | None,
    gigabytes: float,
    display: Display,
    mismatch: bool = False,
    threads: int | None = None,
) -> None:
    """Merges by a recipe file.

    Args:
        path: The recipe file.
        out: The directory to write, whole or not at all; an earlier merge that is there is replaced, nothing else.
        dtype: Name of the output dtype; None for the base's.
        gigabytes: Working memory; local checkpoints are read by memory map, which takes none of it.
        display: Shows progress.
        mismatch: Also shows the gradient mismatch (with the recipe's own factors) that Fisher information predicts.
        threads: Weights merged side by side; None for as many as there are processors.

    Raises:
        MergequestError: Something is wrong with the recipe, a checkpoint or a statistic; nothing was written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"unknown dtype '{dtype}'. {did_you_mean(dtype, list(DTYPES))}")
    file = load_recipe(path)
    recipe = file.recipe()
    _require_free(out, path, file)
    require_writable(out)
    with display.phase(f"Merging {len(file.members)} members by {recipe.method}"):
        material = file.material()
        recipe = material.check(recipe)
        if mismatch:
            require_fishers(material, recipe)
        files = file.files_from.files(material.pool)
        checkpoints = {name: member.checkpoint for name, member in material.pool.members.items()}
        for note in (*material.pool.notes, *notes_on_files(material.pool.base, checkpoints)):
            display.note(note)
        members = {name: (member.checkpoint, member.statistics) for name, member in file.members.items()}
        entries = sum(info.nbytes // info.dtype.itemsize for info in material.pool.weights.values())
        with display.bar("million parameters", -(-entries // MILLION)) as bar:
            report = merge_to_disk(
                material,
                recipe,
                out,
                dtype=DTYPES[dtype] if dtype else None,
                max_bytes=int(gigabytes * 1e9),
                threads=threads,
                extra={
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
                        directory=out,
                    ),
                },
                progress=lambda done, total: bar.reach(-(-done // MILLION)),
            )
        for name, value in report.items():
            if "." not in name:  # of all weights, not of each
                display.note(f"{name}: {value:.3g}")
        if mismatch:
            found = quadratic_mismatch(material, Checkpoint.open(out).read, recipe)
            terms = ", ".join(f"{member} {norm:.3g}" for member, norm in found.members.items())
            display.note(f"gradient mismatch, as Fisher information predicts it: {found.total:.3g} ({terms})")


def _require_free(out: str, recipe: str, file: RecipeFile) -> None:
    """Looks whether something would be lost if the directory were replaced.

    Raises:
        SettingsError: It is or holds what is merged, the recipe, or the working directory.
        StorageError: It holds anything but an earlier merge.
    """
    used = {"the base": [file.base], "the recipe": [parent(recipe)], "a file of statistics": [*file.statistics]}
    used["a file of statistics"] += file.base_statistics
    for name, member in file.members.items():
        used[f"member '{name}'"] = [member.checkpoint]
        used["a file of statistics"] += member.statistics
    for what, places in used.items():
        for place in places:
            if storage.contains(out, place):
                raise SettingsError(f"{out} would replace {place}, where {what} is: name another directory")
    if storage.contains(out, "."):
        raise SettingsError(f"{out} would replace the directory that this command runs in: name another one")
    require_replaceable(out)
