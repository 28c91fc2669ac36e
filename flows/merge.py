"""`mergequest merge`: a recipe file in, a Hugging Face directory out."""

import torch

from flows.config import require_writable
from flows.progress import Display
from flows.recipe_file import dump_recipe, load_recipe
from merging.disk import merge_to_disk
from merging.errors import SettingsError
from merging.registry import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_recipe(path: str, out: str, dtype: str | None, gigabytes: float, display: Display) -> None:
    """Merges by a recipe file.

    Args:
        path: The recipe file.
        out: The directory to write; replaced if it is a checkpoint, whole or not at all.
        dtype: Name of the output dtype; None for the base's.
        gigabytes: Weights held at once.
        display: Shows progress.

    Raises:
        MergequestError: Something is wrong with the recipe, a checkpoint or a statistic; nothing was written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"unknown dtype '{dtype}'. {did_you_mean(dtype, list(DTYPES))}")
    file = load_recipe(path)
    recipe = file.recipe()
    require_writable(out)
    with display.phase(f"Merging {len(file.members)} members by {recipe.method}"):
        material = file.material()
        for note in material.pool.notes:
            display.note(note)
        members = {name: (member.checkpoint, member.statistics) for name, member in file.members.items()}
        with display.bar("tensors", len(material.pool.weights)) as bar:
            report = merge_to_disk(
                material,
                recipe,
                out,
                dtype=DTYPES[dtype] if dtype else None,
                max_bytes=int(gigabytes * 1e9),
                extra={"recipe.yaml": dump_recipe(file.base, members, recipe, file.statistics)},
                progress=lambda done, total: bar.reach(done),
            )
        for name, value in report.items():
            if "." not in name:  # of all weights, not of each
                display.note(f"{name}: {value:.3g}")
