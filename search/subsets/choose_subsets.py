"""Which subsets of a pool's members to merge: by quality and diversity, by chance, all, or as somebody says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb, isfinite
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from merging.errors import SelectionError
from merging.registry import did_you_mean
from search.subsets import dpp, dpp_kernel
from search.subsets.dpp_kernel import Matrix

Mode: TypeAlias = Literal[
    "dpp-map", "dpp-sample", "every", "random", "greedy-forward", "greedy-soup", "greedy-ranked", "all", "fixed"
]
Subset: TypeAlias = tuple[str, ...]

NAMED: tuple[Mode, ...] = ("fixed", "greedy-forward", "greedy-soup", "greedy-ranked")
"""Modes whose subsets somebody names: the user, or whoever measured them (`search.subsets.greedy`)."""
MOST_LISTED = 256
"""Subsets that a search chooses among in mode `every`. Optuna stores the list with each trial: 256 subsets of six
members are about 10 kB."""
MOST_SHOWN = 16
"""Columns of S that a terminal has room for."""
MOST_SIZES = 16
"""Without a word on sizes, subsets of a large pool have at most so many members, but for the one of all."""


@dataclass(frozen=True)
class Selection:
    """Subsets of members, and the quality and diversity that they were chosen by.

    Args:
        mode: How they were chosen.
        names: The pool's members, in the order of `similarity`.
        subsets: Each sorted by name; the set of all members is always the last.
        log_dets: log det(L_Y) of each subset; −inf where it is 0, NaN without quality and similarity.
        quality: Member → q; empty where none was asked for.
        similarity: S [N, N]; None where none was asked for.
        effective_rank: How many members S tells apart; NaN without S.
        notes: What a user should know: members dropped, sizes left out.
    """

    mode: Mode
    names: Subset
    subsets: list[Subset]
    log_dets: list[float]
    quality: dict[str, float] = field(default_factory=dict)
    similarity: Matrix | None = None
    effective_rank: float = float("nan")
    notes: list[str] = field(default_factory=list)

    def as_text(self) -> list[str]:
        """The subsets with log det(L_Y), and before them q and S that L is made of, where they were asked for."""
        lines = []
        if self.similarity is not None:
            width = max(map(len, self.names))
            lines.append(
                f"{'member':{width}}  {'q':>8}  S (effective rank {self.effective_rank:.2f} of {len(self.names)})"
            )
            for name, row in zip(self.names, self.similarity, strict=True):
                shown = " ".join(f"{value:6.3f}" for value in row[:MOST_SHOWN]) + (
                    " …" if len(row) > MOST_SHOWN else ""
                )
                lines.append(f"{name:{width}}  {self.quality.get(name, float('nan')):8.4f}  {shown}")
        for subset, value in zip(self.subsets, self.log_dets, strict=True):
            lines.append(f"{len(subset)}  log det {value:8.3f}  {' '.join(subset)}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite becomes null."""
        return {
            "mode": self.mode,
            "names": list(self.names),
            "subsets": [list(subset) for subset in self.subsets],
            "log_dets": [value if isfinite(value) else None for value in self.log_dets],
            "quality": dict(self.quality),
            "similarity": None if self.similarity is None else self.similarity.tolist(),
            "effective_rank": self.effective_rank if isfinite(self.effective_rank) else None,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Selection":
        """What `as_dict` wrote.

        Raises:
            SelectionError: It is something else.
        """
        try:
            similarity = value["similarity"]
            missing = float("nan") if similarity is None else float("-inf")
            return cls(
                mode=value["mode"],
                names=tuple(value["names"]),
                subsets=[tuple(subset) for subset in value["subsets"]],
                log_dets=[missing if entry is None else float(entry) for entry in value["log_dets"]],
                quality={name: float(q) for name, q in value["quality"].items()},
                similarity=None if similarity is None else np.array(similarity, dtype=np.float64),
                effective_rank=float("nan") if value["effective_rank"] is None else value["effective_rank"],
                notes=list(value["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SelectionError(f"not a selection ({error!r}); remove selection.json and select again") from error


def select(
    names: Sequence[str],
    mode: Mode,
    *,
    quality: Mapping[str, float] | None = None,
    similarity: Matrix | None = None,
    sizes: Sequence[int] | None = None,
    draws: int = 4,
    seed: int = 0,
    subsets: Sequence[Sequence[str]] = (),
    unit: bool = False,
    notes: Sequence[str] = (),
) -> Selection:
    """Selects subsets of members; the set of all members is always among them, for the plain average.

    Args:
        names: The pool's members.
        mode: `dpp-map`, the most probable subset per size; `dpp-sample`, `draws` subsets of each size from
            the k-DPP; `every`, every subset of these sizes while there are at most 256, else as many drawn
            from the k-DPP; `random`, `draws` subsets of each size, all equally likely; `all`, nothing but the
            set of all members; `fixed` and the greedy modes, the given `subsets`.
        quality: Member → q ≥ 0, as `kernel.quality` gives it; the DPP leaves out members with q = 0.
        similarity: S [N, N] in the order of `names`, as `kernel.similarity_from_…` gives it.
        sizes: Sizes of subsets; from 2 to N where none are given, but at most 16.
        draws: Subsets drawn for each size; those drawn twice count once.
        seed: Of the draws.
        subsets: For the modes in `NAMED`.
        unit: Divide q by its norm in L, as the paper does.
        notes: Notes on quality and similarity, kept with the selection.

    Raises:
        SelectionError: A DPP without quality or similarity, names that don't match, an impossible size.
    """
    members = tuple(names)
    if not members or len(set(members)) < len(members):
        raise SelectionError(f"a selection needs members with different names, not {list(members)}")
    L = _kernel(members, quality, similarity, unit)
    remarks = list(notes)
    if mode in NAMED:
        chosen = [_named(subset, members) for subset in subsets]
        if not chosen:
            raise SelectionError(f"mode '{mode}' needs subsets: name the members of at least one")
    elif mode == "all":
        chosen = []
    elif mode == "random":
        chosen = _at_random(members, _sizes(np.eye(len(members)), sizes, remarks), seed, draws)
    elif mode in ("dpp-map", "dpp-sample", "every"):
        if L is None:
            raise SelectionError(f"mode '{mode}' needs quality and similarity of the members; or take mode 'all'")
        wanted = _sizes(L, sizes, remarks)
        if mode == "every":
            drawn = _every(L, wanted, seed, remarks)
        elif mode == "dpp-map":
            drawn = [dpp.map_subset(L, k) for k in wanted]
        else:
            drawn = [subset for k in wanted for subset in _draw(L, k, seed, draws)]
        chosen = [tuple(sorted(members[i] for i in subset)) for subset in drawn]
    else:
        raise SelectionError(f"unknown mode '{mode}'. {did_you_mean(mode, list(get_args(Mode)))}")
    everyone = tuple(sorted(members))
    unique = [*dict.fromkeys(subset for subset in chosen if subset != everyone), everyone]
    return Selection(
        mode=mode,
        names=members,
        subsets=unique,
        log_dets=[_log_det(L, members, subset) for subset in unique],
        quality=dict(quality or {}),
        similarity=similarity,
        effective_rank=float("nan") if similarity is None else dpp_kernel.effective_rank(similarity),
        notes=remarks,
    )


def _kernel(names: Subset, quality: Mapping[str, float] | None, similarity: Matrix | None, unit: bool) -> Matrix | None:
    if quality is not None and set(quality) != set(names):
        raise SelectionError(f"quality is of members {sorted(quality)}, the pool has {sorted(names)}; give each a q")
    if similarity is not None and similarity.shape != (len(names), len(names)):
        raise SelectionError(
            f"similarity has shape {list(similarity.shape)}, the pool {len(names)} members, not one row each"
        )
    if quality is None or similarity is None:
        return None
    q = np.array([quality[name] for name in names])
    return dpp_kernel.kernel(q / (np.linalg.norm(q) or 1.0) if unit else q, similarity)


def _sizes(L: Matrix, sizes: Sequence[int] | None, notes: list[str]) -> list[int]:
    """Sizes that the kernel can serve: a larger one is an error where asked for, else a note."""
    most = dpp.rank(L)
    if sizes is not None:
        if wrong := [k for k in sizes if not 1 <= k <= most]:
            raise SelectionError(
                f"sizes {wrong} cannot be selected from {len(L)} members: their kernel has rank {most}; "
                f"ask for sizes from 1 to {most}, or for another similarity"
            )
        return sorted(set(sizes))
    if most < min(len(L), MOST_SIZES):
        notes.append(f"the kernel of {len(L)} members has rank {most}: no subset larger than {most} but all of them")
    return list(range(2, min(most, MOST_SIZES) + 1))


def _every(L: Matrix, sizes: Sequence[int], seed: int, notes: list[str]) -> list[tuple[int, ...]]:
    """Every subset that has a determinant, or the likeliest of each size and as many others as can be listed."""
    there = sum(comb(len(L), k) for k in sizes)
    if there <= MOST_LISTED:
        listed = [subset for k in sizes for subset in combinations(range(len(L)), k)]
        log_dets = dpp.log_determinants(L, listed)
        return [subset for subset, value in zip(listed, log_dets, strict=True) if isfinite(value)]
    a_size = max(1, MOST_LISTED // len(sizes))
    notes.append(f"{there:.3g} subsets are too many to list: {a_size} of each size are drawn from the k-DPP")
    drawn = [[dpp.map_subset(L, k), *_draw(L, k, seed, a_size - 1)] for k in sizes]
    return [subset for of_a_size in drawn for subset in dict.fromkeys(of_a_size)]


def _at_random(members: Subset, sizes: Sequence[int], seed: int, draws: int) -> list[Subset]:
    """Different subsets of each size, all equally likely."""
    generator = np.random.default_rng(seed)
    drawn = [tuple(sorted(generator.choice(members, k, replace=False).tolist())) for k in sizes for _ in range(draws)]
    return list(dict.fromkeys(drawn))


def _draw(L: Matrix, k: int, seed: int, draws: int) -> list[tuple[int, ...]]:
    """Different subsets of size k, the most probable first."""
    drawn = set(dpp.sample_k_dpp(L, k, seed, draws))
    return sorted(drawn, key=lambda subset: (-dpp.log_determinant(L, subset), subset))


def _named(subset: Sequence[str], members: Subset) -> Subset:
    for name in subset:
        if name not in members:
            raise SelectionError(f"a fixed subset names '{name}'. {did_you_mean(name, list(members))}")
    if not subset or len(set(subset)) < len(subset):
        raise SelectionError(f"a fixed subset must name each member once, and at least one: {list(subset)}")
    return tuple(sorted(subset))


def _log_det(L: Matrix | None, members: Subset, subset: Subset) -> float:
    if L is None:
        return float("nan")
    return dpp.log_determinant(L, [members.index(name) for name in subset])
