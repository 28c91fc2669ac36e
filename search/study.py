"""The Optuna study of a search: in memory, rebuilt from the ledger whenever a driver starts.

The ledger is the only truth. What a sampler must find again besides parameters and values (the generation that a candidate was
bred in, say) is in the row's `sampler`, so that a search that was killed proposes what it would have proposed.
"""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from itertools import count
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from merging.errors import MergequestError, MethodError, SettingsError, StorageError
from merging.io.documents import as_object, parse_json
from merging.recipe import Recipe
from search.candidate import PARTIAL
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import point
from search.space.search_space import Space

CANDIDATE, ORIGIN = "candidate", "origin"
"""User attributes of a trial: the identity of its recipe, set when that is complete; why it is there, if the
sampler did not propose it."""

NOTES, VOID, PARAMS = "notes", "void", "params"
"""Keys of a row's `sampler`: system attributes of its trial; number → the same and parameters of the trials since the last
candidate that led to none."""
_FLEETING = ("fixed_params", "tpe:relative_params", "gp:relative_params", "constraint")
"""Beginnings of the system attributes that nobody reads once a trial has its parameters, or that the row has by itself."""


def build_study(ledger: Ledger, space: Space, *, objectives: int = 1, split: str = "validation") -> Study:
    """A study in memory that agrees with ledger and space.

    Rows that were measured before the search (by a greedy selection, say) are trials before all others, where they
    lie in the space: the sampler learns from them. A trial that was proposed and has no row, since the driver ended while it
    was being evaluated, is proposed again under its number. Baselines without a row wait to be asked.

    Args:
        ledger: What has been measured.
        space: What is searched.
        objectives: How many numbers are maximised.
        split: What candidates are measured on.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # progress is shown by the search's observer
    study = optuna.create_study(directions=["maximize"] * objectives)
    study.add_trials(_trials(ledger, space, objectives, split))
    return study


def lasting(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler noted with a proposal, of a trial's system attributes, and will ask for again."""
    return {name: value for name, value in attributes.items() if not name.startswith(_FLEETING)}


def recordable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `lasting` that a row can hold: a foreign sampler may note anything in a study that is in memory."""
    kept = {}
    for name, value in lasting(attributes).items():
        with suppress(TypeError, ValueError, RecursionError, StorageError):
            parse_json(json.dumps({VOID: {"0": {NOTES: {name: value}}}}), "`sampler`")
            kept[name] = value
    return kept


def _trials(ledger: Ledger, space: Space, objectives: int, split: str) -> list[FrozenTrial]:
    """The trials that the study should have, numbered by their place."""
    rows = [row for row in ledger.rows() if row.split == split and _is_heard(row, space)]
    again = [row for row in ledger.retried if row.split == split]
    trials: dict[int, FrozenTrial] = {}
    for row in (*again, *rows):
        trials |= {number: _void_trial(entry, space) for number, entry in _void(row)}
    trials |= {row.trial: create_trial(state=TrialState.FAIL) for row in again if row.trial is not None}
    numbered = {row.trial: row for row in rows if row.trial is not None}
    trials |= {number: _from_row(row, space, objectives) for number, row in numbered.items()}
    free = (number for number in count() if number not in trials)
    for row in (row for row in rows if row.trial is None):
        trials[next(free)] = _from_row(row, space, objectives)
    lost = _lost(numbered, trials)
    baselines = [recipe for recipe in space.baselines() if recipe in space]
    firsts = {recipe.identity for recipe in baselines}
    waiting = [_waiting(row.recipe, space, row.candidate in firsts) for row in again if row.recipe in space]
    there = {row.candidate for row in (*rows, *again)}
    for recipe in (recipe for recipe in baselines if recipe.identity not in there):
        if lost:
            trials[lost.pop(0)] = _waiting(recipe, space, first=True)
        else:
            waiting.append(_waiting(recipe, space, first=True))
    trials |= {number: create_trial(state=TrialState.WAITING) for number in lost}
    # Numbers of which nothing is known keep their place: the next proposal has the number that it would have had.
    placed = [
        trials.get(number) or create_trial(state=TrialState.FAIL) for number in range(max(trials, default=-1) + 1)
    ]
    return placed + waiting


def _is_heard(row: Row, space: Space) -> bool:
    """Whether a row is for the sampler: it proposed it, or could have."""
    return row.trial is not None or (row.origin in ("anchor", "search") and row.recipe in space)


def _void(row: Row) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbers of the trials before a row's that led to no candidate, and what is known of each."""
    for number, entry in as_object((row.sampler or {}).get(VOID) or {}, "`sampler`").items():
        if number.isdecimal() and row.trial is not None and int(number) < row.trial:
            yield int(number), as_object(entry, "`sampler`")


def _lost(numbered: Mapping[int, Row], trials: Container[int]) -> list[int]:
    """Numbers that were proposed and have no row; rows of earlier versions say nothing of those before them."""
    lost, first = [], 0
    for number in sorted(numbered):
        if numbered[number].sampler is not None:
            lost += [between for between in range(first, number) if between not in trials]
        first = number + 1
    return lost


def _void_trial(entry: Mapping[str, Any], space: Space) -> FrozenTrial:
    """A trial that led to no candidate, with its parameters where they are the space's."""
    notes, params = dict(entry.get(NOTES) or {}), dict(entry.get(PARAMS) or {})
    try:
        distributions = space.distributions(space.suggest(FixedTrial(params)))
        return create_trial(state=TrialState.FAIL, params=params, distributions=distributions, system_attrs=notes)
    except (ValueError, MergequestError):
        return create_trial(state=TrialState.FAIL, system_attrs=notes)


def _from_row(row: Row, space: Space, objectives: int) -> FrozenTrial:
    """A finished trial from its row; without parameters where the space has no such recipe any more."""
    user = {CANDIDATE: row.candidate, ORIGIN: row.origin}
    try:
        params = space.params(row.recipe)
    except (MethodError, SettingsError):
        return create_trial(state=TrialState.FAIL, user_attrs=user)
    state, values, reported = TrialState.FAIL, None, {}
    if row.status == "complete" and len(point(row)) == objectives:
        state, values = TrialState.COMPLETE, point(row)
    elif row.status == "pruned":
        state = TrialState.PRUNED
        if PARTIAL in row.proxies and objectives == 1:
            values, reported = (row.proxies[PARTIAL],), {sum(row.examples.values()): row.proxies[PARTIAL]}
    trial = create_trial(
        state=state,
        values=values,
        params=params,
        distributions=space.distributions(row.recipe),
        user_attrs=user,
        system_attrs=dict((row.sampler or {}).get(NOTES) or {}),
        intermediate_values=reported,
    )
    for name in row.violations.keys() - trial.constraints.keys():
        trial.set_constraint(name, row.violations[name])
    return trial


def _waiting(recipe: Recipe, space: Space, first: bool) -> FrozenTrial:
    """A trial that will be asked for this recipe, as `Study.enqueue_trial` would have it."""
    return create_trial(
        state=TrialState.WAITING,
        user_attrs={CANDIDATE: recipe.identity, ORIGIN: "anchor" if first else "search"},
        system_attrs={"fixed_params": space.params(recipe)},
    )
