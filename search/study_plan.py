"""The trials that a study should have: what its own, the ledger and the space say together.

Finished trials stay as they are, a trial whose row is in the ledger is finished from it, and a trial that was being
evaluated waits to be asked again, under its number and with its parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from merging.errors import MergequestError, MethodError, SettingsError
from merging.recipe import Recipe
from search.candidate import PARTIAL
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import point
from search.space.search_space import Space

CANDIDATE, ORIGIN, DUPLICATE = "candidate", "origin", "duplicate"
"""User attributes of a trial: the identity of its recipe, set when that is complete; why it is there, if the
sampler did not propose it; that its recipe was known already."""


@dataclass(frozen=True)
class Wanted:
    """What a study has to agree with.

    Args:
        rows: What the ledger has for the sampler, by candidate; rows without a number were measured before the search.
        space: What is searched, now.
        objectives: How many numbers are maximised.
        again: Recipes that failed and are to be measured again.
    """

    rows: Mapping[str, Row]
    space: Space
    objectives: int = 1
    again: Sequence[Recipe] = ()


def wanted_of(ledger: Ledger, space: Space, objectives: int, split: str) -> Wanted:
    """What a study has to agree with, of a ledger's rows on the split that candidates are measured on."""
    rows = {row.candidate: row for row in ledger.rows() if row.split == split and _is_heard(row, space)}
    again = [row.recipe for row in ledger.retried if row.split == split and row.recipe in space]
    return Wanted(rows, space, objectives, again)


def plan(trials: Sequence[FrozenTrial], wanted: Wanted, *, same_space: bool = False) -> list[FrozenTrial]:
    """The trials that a study should have, numbered by their place.

    Args:
        trials: Those that it has.
        wanted: What they have to agree with.
        same_space: Whether finished trials are known to be of this very space: looking at each takes a millisecond.
    """
    rows, space, objectives = wanted.rows, wanted.space, wanted.objectives
    agreed = trials if all(_agrees(trial, rows, space, same_space) for trial in trials) else ()
    planned = [_settled(trial, rows, space, objectives) for trial in agreed]
    if planned and planned[-1] is None:
        planned.pop()  # killed while it was being proposed: its number is asked again, with the same seed
    complete = [trial or create_trial(state=TrialState.FAIL) for trial in planned]
    there = {trial.user_attrs.get(CANDIDATE) for trial in complete}
    missing = [row for row in rows.values() if row.candidate not in there]
    taken = {row.trial for row in missing}
    free = (number for number in count(len(complete)) if number not in taken)
    places = [(next(free) if row.trial is None else row.trial, row) for row in missing]
    for number, row in sorted(places, key=lambda place: place[0]):
        # Numbers without a row keep their place: the next proposal has the number that it would have had.
        complete += [create_trial(state=TrialState.FAIL) for _ in range(number - len(complete))]
        complete.append(_from_row(row, space, objectives))
    baselines = {recipe.identity for recipe in space.baselines()}
    waiting = {trial.user_attrs.get(CANDIDATE) for trial in complete if trial.state == TrialState.WAITING}
    for recipe in (recipe for recipe in wanted.again if recipe.identity not in waiting):
        origin = "anchor" if recipe.identity in baselines else "search"
        complete.append(_waiting(space.params(recipe), {CANDIDATE: recipe.identity, ORIGIN: origin}))
    there = {trial.user_attrs.get(CANDIDATE) for trial in complete}
    for recipe in space.baselines():
        if recipe in space and recipe.identity not in there:
            complete.append(_waiting(space.params(recipe), {CANDIDATE: recipe.identity, ORIGIN: "anchor"}))
    return complete


def _is_heard(row: Row, space: Space) -> bool:
    """Whether a row is for the sampler: it proposed it, or could have."""
    return row.trial is not None or (row.origin in ("anchor", "search") and row.recipe in space)


def _agrees(trial: FrozenTrial, rows: Mapping[str, Row], space: Space, same_space: bool) -> bool:
    """Whether a trial is one that this space and this ledger could have led to."""
    candidate = trial.user_attrs.get(CANDIDATE)
    complete = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    if candidate is None:
        return not complete
    if complete and candidate not in rows:
        return False
    if same_space and trial.state.is_finished():
        return True
    try:
        recipe = space.suggest(FixedTrial(_params(trial)))
        wanted = space.distributions(recipe)
    except (ValueError, MergequestError):
        return False
    return recipe.identity == candidate and trial.distributions.items() <= wanted.items()


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters, those included that it was told to take and has not taken yet."""
    return dict(trial.system_attrs.get("fixed_params") or trial.params)


def _settled(trial: FrozenTrial, rows: Mapping[str, Row], space: Space, objectives: int) -> FrozenTrial | None:
    """What a trial becomes now that nobody is working on it; None where it never had a whole recipe."""
    if trial.state.is_finished():
        return trial
    candidate = trial.user_attrs.get(CANDIDATE)
    if candidate is None:
        return None
    row = rows.get(candidate)
    if row is not None and row.trial == trial.number:
        return _from_row(row, space, objectives, trial.system_attrs)
    if trial.state == TrialState.WAITING:
        return trial
    return _waiting(_params(trial), trial.user_attrs, trial.system_attrs)


def _from_row(row: Row, space: Space, objectives: int, system: Mapping[str, Any] | None = None) -> FrozenTrial:
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
        system_attrs=dict(system or {}),
        intermediate_values=reported,
    )
    for name in row.violations.keys() - trial.constraints.keys():
        trial.set_constraint(name, row.violations[name])
    return trial


def _waiting(
    params: Mapping[str, Any], user: Mapping[str, Any], system: Mapping[str, Any] | None = None
) -> FrozenTrial:
    """As `Study.enqueue_trial` would have it, with what the sampler noted when it proposed it."""
    return create_trial(
        state=TrialState.WAITING,
        user_attrs=dict(user),
        system_attrs={**(system or {}), "fixed_params": dict(params)},
    )
