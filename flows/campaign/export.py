"""The winner as a Hugging Face directory: weights, each task's head, a model card, and the recipe that repeats it."""

import json
import math
import platform
from collections.abc import Mapping

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import save

from flows.campaign.open_campaign import OpenCampaign
from flows.config.recipe_file import RECIPE, dump_recipe
from flows.report.scales import Scales, scales_of
from flows.report.table import Cell, text
from merging.io import addresses, hub
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material, head_tensors, open_statistics
from merging.recipe import BASE, Recipe, nested
from merging.tasks.head import class_of
from merging.versions import code_version, version_of
from search.ledger.row import Row

HEAD = "head.safetensors"


def export(
    opened: OpenCampaign,
    statistics: Mapping[str, tuple[str, ...]],
    recipe: Recipe,
    path: str,
    *,
    table: str,
    row: Row | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Writes a merged model that `from_pretrained` loads, whole or not at all.

    Args:
        opened: The campaign.
        statistics: Member → statistics files.
        recipe: What to merge.
        path: The directory to write.
        table: The results table in Markdown, for the card.
        row: The candidate's row, for the card.
        dtype: Of the weights; the base's by default.

    Returns:
        The method's figures on the merge.
    """
    used = dict(statistics)
    material = Material(opened.pool, open_statistics(opened.pool, used), opened.examples())
    members = {name: (m.checkpoint.path, tuple(used.get(name, ()))) for name, m in opened.pool.members.items()}
    extra: dict[str, str | bytes | None] = {
        **opened.campaign.files_from.files(opened.pool),
        "README.md": model_card(opened, recipe, table, row),
        RECIPE: dump_recipe(
            opened.pool.base.path,
            members,
            recipe,
            used.get("+".join(recipe.members), ()),
            base_statistics=used.get(BASE, ()),
            examples=opened.examples(),
            heads=opened.campaign.heads,
            vocabulary=opened.campaign.vocabulary,
            max_distance=opened.campaign.max_distance,
            files_from=opened.campaign.files_from,
            directory=path,
        ),
    }
    for task, owner in owners_of_heads(opened).items():
        config = dict(opened.pool.members[owner].checkpoint.config)
        extra[f"heads/{task}/config.json"] = json.dumps(config, indent=2) + "\n"
        extra[f"heads/{task}/{HEAD}"] = save(head_tensors(opened.pool, owner), metadata={"format": "pt"})
    return merge_to_disk(material, recipe, path, dtype=dtype, extra=extra)


def owners_of_heads(opened: OpenCampaign) -> dict[str, str]:
    """Task → its owner, where that keeps tensors for the task."""
    owners = opened.campaign.owners()
    return {task: owner for task, owner in owners.items() if opened.pool.members[owner].head}


def model_card(opened: OpenCampaign, recipe: Recipe, table: str, row: Row | None) -> str:
    """The card of a merged model: members, method, parameters, scores, versions, and how to load it."""
    templates = Environment(
        loader=PackageLoader("flows"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return templates.get_template("model_card.md.j2").render(
        campaign=opened.campaign,
        base=public_name(opened.campaign.base),
        checkpoints={name: public_name(member.checkpoint) for name, member in opened.campaign.members.items()},
        recipe=recipe,
        factors={member: in_words(factors) for member, factors in nested(recipe.scaling).items()},
        table=table,
        row=row,
        cell=lambda row, task: _score(row, task, scales_of(opened.campaign.tasks)),
        owners=owners_of_heads(opened),
        fingerprints=opened.pool.fingerprints(),
        architecture=opened.pool.base.architecture if opened.pool.base.architecture.isidentifier() else "unknown",
        auto_class=class_of(opened.pool.base.config),
        classes={
            task: class_of(opened.pool.members[owner].checkpoint.config)
            for task, owner in opened.campaign.owners().items()
        },
        versions=versions(),
    )


def public_name(path: str) -> str:
    """What a checkpoint is called outside this machine: its address, or the last part of its path."""
    if hub.SCHEME in path:
        return path.replace(hub.SCHEME, "")
    return addresses.base_name(path) if addresses.is_local(path) else path


def _score(row: Row, task: str, scales: Scales) -> str:
    """A row's score on a task as it is read."""
    return text(Cell(row.scores[task], row.standard_errors.get(task, math.nan), scales.of_task(task)))


def in_words(factors: float | Mapping[str, float]) -> str:
    """A member's scaling factor, or that of each of its groups of weights, for a cell of a Markdown table."""
    if isinstance(factors, Mapping):
        return ", ".join(f"{factor:.4g} (`{group}`)" for group, factor in factors.items())
    return f"{factors:.4g}"


def versions() -> dict[str, str]:
    """What ran: mergequest, Python and the libraries that results depend on."""
    by_package = {"mergequest": code_version(), "python": platform.python_version()}
    for package in ("torch", "transformers", "optuna", "ray", "dppy", "safetensors"):
        by_package[package] = version_of(package)
    return by_package
