"""Subsets of members for the search: q from the references' scores, S from representations or task vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flows.campaign.needed_statistics import representations, require_representations
from flows.campaign.open_campaign import OpenCampaign
from flows.config.sections import SelectionSettings
from flows.directory.progress import Display
from merging.checkpoints.delta_products import inner_products
from merging.errors import SelectionError
from merging.recipe import REFERENCE_BASE, REFERENCE_MEMBER
from merging.statistics import StatisticsFile
from search.ledger.row import Row
from search.samplers.make_sampler import QUALITY_DIVERSITY
from search.subsets import dpp_kernel
from search.subsets.choose_subsets import Selection, select
from search.subsets.greedy import Scores, greedy_forward, greedy_soup, ranked_prefixes


def prepare_selection(opened: OpenCampaign, cache: str, display: Display) -> None:
    """Computes what `select_subsets` will read, while the cluster is free for it."""
    settings = opened.campaign.selection
    if _needs_kernel(opened) and settings.similarity == "representation" and len(opened.pool.members) > 1:
        representations(opened, cache, display)


def select_subsets(
    opened: OpenCampaign, references: Sequence[Row], cache: str, display: Display, scores: Scores
) -> Selection:
    """Selects as the campaign file says.

    Args:
        opened: The campaign.
        references: Validation rows of the base and of every member.
        cache: Directory of computed statistics.
        display: Shows progress.
        scores: Measures subsets on validation, for the greedy modes.

    Raises:
        SelectionError: Quality or similarity are unusable; the message names the setting to use instead.
    """
    settings = opened.campaign.selection
    members = list(opened.pool.members)
    if len(members) < 2:
        return select(members, "all")
    quality, similarity = None, None
    notes: list[str] = []
    if _needs_kernel(opened):
        quality, notes = member_quality(opened, references)
        similarity = member_similarity(opened, cache, display)
    for note in notes:
        display.note(note)
    return select(
        members,
        settings.mode,
        quality=quality,
        similarity=similarity,
        sizes=settings.sizes,
        draws=settings.draws,
        seed=opened.campaign.seed,
        subsets=_named_subsets(settings, members, scores),
        unit=settings.norm == "unit",
        notes=notes,
    )


def require_kernel(opened: OpenCampaign) -> None:
    """Looks whether q and S, where they are asked for, have what they are made from; computes nothing.

    Raises:
        SelectionError: They have not; the message names the setting to use instead.
        StatisticsError: A member has no task that loads its model, or a task no training split for examples.
    """
    settings = opened.campaign.selection
    if not _needs_kernel(opened) or len(opened.pool.members) < 2:
        return
    if settings.quality == "gain":
        for member in opened.pool.members:
            _require_task(opened, member)
    if settings.similarity == "representation":
        _require_logits(opened)
        require_representations(opened)


def _require_task(opened: OpenCampaign, member: str) -> str:
    task = opened.campaign.task_of(member)
    if task is None:
        raise SelectionError(f"'{member}' has no task to measure its quality on: set selection.quality to 'equal'")
    return task


def _require_logits(opened: OpenCampaign) -> None:
    if not any(task.has_logits for task in opened.sources.values()):
        raise SelectionError(
            "no task gives representations (custom evaluators only): set selection.similarity to 'task-vector'"
        )


def _needs_kernel(opened: OpenCampaign) -> bool:
    """Whether q and S are asked for: by the mode, or by the sampler that draws by them."""
    campaign = opened.campaign
    return campaign.selection.mode.startswith(("dpp", "every")) or campaign.search.sampler == QUALITY_DIVERSITY


def _named_subsets(settings: SelectionSettings, members: Sequence[str], scores: Scores) -> Sequence[Sequence[str]]:
    """The subsets that the file names, or that measuring finds."""
    if settings.mode == "greedy-soup":
        return [greedy_soup(members, scores)]
    if settings.mode == "greedy-ranked":
        path = ranked_prefixes(members, scores)
    elif settings.mode == "greedy-forward":
        path = greedy_forward(members, scores, max(settings.sizes) if settings.sizes else None)
    else:
        return settings.subsets
    return [subset for subset in path if len(subset) in settings.sizes] if settings.sizes else path[1:] or path


def member_quality(opened: OpenCampaign, references: Sequence[Row]) -> tuple[dict[str, float], list[str]]:
    """Q of every member: its relative gain over the base on its own task, or 1 where the file says `equal`.

    Raises:
        SelectionError: A member has no task, or its reference failed.
    """
    members = list(opened.pool.members)
    if opened.campaign.selection.quality == "equal":
        return dict.fromkeys(members, 1.0), []
    base = next((row for row in references if row.method == REFERENCE_BASE), None)
    own = {row.members[0]: row for row in references if row.method == REFERENCE_MEMBER}
    scores, base_scores = {}, {}
    for member in members:
        task = _require_task(opened, member)
        if base is None or task not in base.scores or task not in own[member].scores:
            failure = own[member].error or (base.error if base else "the base was not measured")
            raise SelectionError(f"the quality of '{member}' is unknown ({failure}): set selection.quality to 'equal'")
        scores[member], base_scores[member] = own[member].scores[task], base.scores[task]
    return dpp_kernel.quality(scores, base_scores)


def member_similarity(opened: OpenCampaign, cache: str, display: Display) -> dpp_kernel.Matrix:
    """S as the campaign file says."""
    settings = opened.campaign.selection
    members = list(opened.pool.members)
    if settings.similarity == "task-vector":
        with display.bar("weights", len(opened.pool.weights)) as bar:
            return dpp_kernel.similarity_from_task_vectors(inner_products(opened.pool, bar.advance), members)
    _require_logits(opened)
    files = representations(opened, cache, display)
    rows = {member: _concatenated(files[member], "representation") for member in members}
    positions = {member: _concatenated(files[member], "positions") for member in members}
    return dpp_kernel.similarity_from_representations(rows, settings.centered, positions)


def _concatenated(files: Mapping[str, str], name: str) -> npt.NDArray[Any]:
    """A tensor of a member's files of all tasks, the tasks' examples one after another."""
    return np.concatenate([StatisticsFile.open(path).read(name).numpy() for path in files.values()])
