"""Questions to the tidy frames of `search.ledger.frame`: what won, at what cost, and what made the difference."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import (
    BaseImportanceEvaluator,
    FanovaImportanceEvaluator,
    MeanDecreaseImpurityImportanceEvaluator,
    PedAnovaImportanceEvaluator,
)
from optuna.trial import TrialState

from search.ledger.frame import MEMBERS_JOINT, candidates, columns, history, searched_split

STATES = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}
Evaluator = Literal["ped-anova", "fanova", "impurity"]
FEWEST = 10
"""PED-ANOVA asks what the best tenth has in common: of fewer candidates that is less than one."""


def validation_beside_test(table: pd.DataFrame) -> pd.DataFrame:
    """What was measured on both splits: how much of what validation promised is there on test.

    The winner was chosen by validation; base, members and the methods' defaults (`origin` `reference` and `anchor`) were
    not, and show how the splits themselves differ.

    Returns:
        A row for each, the best on validation first: `candidate`, `origin`, `method`, `members`, the means over tasks
        `validation` and `test`, `change` from one to the other, and its `standard_error` over the choice of examples.
    """
    kept = ["candidate", "origin", "method", "members", "mean"]
    halves = {
        split: table[(table["split"] == split) & (table["status"] == "complete")] for split in ("validation", "test")
    }
    tasks = list(columns(table, "standard_error").values())
    for split, half in halves.items():
        squares = (half[tasks].astype(np.float64) ** 2).sum(axis=1, skipna=False)
        halves[split] = half[kept].assign(variance=squares / max(1, len(tasks)) ** 2)
    both = halves["validation"].merge(halves["test"][["candidate", "mean", "variance"]], on="candidate")
    both = both.rename(columns={"mean_x": "validation", "mean_y": "test"})
    both["change"] = both["test"] - both["validation"]
    both["standard_error"] = np.sqrt(both.pop("variance_x") + both.pop("variance_y"))
    return both.sort_values("validation", ascending=False, kind="stable").reset_index(drop=True)


def importance(source: optuna.Study | pd.DataFrame, evaluator: Evaluator = "ped-anova") -> pd.Series:
    """How much each parameter of the search decides about the objective, by Optuna.

    Args:
        source: A campaign's study, or its tidy frame.
        evaluator: `ped-anova`: what the best tenth differs in from the rest, also for parameters that only some
            methods have. `fanova`, `impurity`: shares of the variance, and of the decrease of impurity, in a random
            forest; Optuna gives them for parameters that all candidates share.

    Returns:
        Parameter → share of importance, largest first; empty where fewer than two candidates differ. Parameters that
        fewer than `FEWEST` candidates have are left out: of so few, chance alone makes some look decisive.
    """
    study = as_study(source) if isinstance(source, pd.DataFrame) else source
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len({tuple(trial.values) for trial in done}) < 2:
        return pd.Series(dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parameters that few candidates have are a matter of course here
        shares = optuna.importance.get_param_importances(
            study, evaluator=make_evaluator(evaluator), target=lambda trial: trial.values[0]
        )
    counts = Counter(name for trial in done for name in trial.params)
    known = pd.Series({name: share for name, share in shares.items() if counts[name] >= FEWEST}, dtype=np.float64)
    return (known / (known.sum() or 1.0)).sort_values(ascending=False, kind="stable")


def make_evaluator(name: Evaluator) -> BaseImportanceEvaluator:
    """Optuna's evaluator of that name; reproducible."""
    if name == "fanova":
        return FanovaImportanceEvaluator(seed=0)
    return MeanDecreaseImpurityImportanceEvaluator(seed=0) if name == "impurity" else PedAnovaImportanceEvaluator()


def marginal_effects(table: pd.DataFrame) -> pd.DataFrame:
    """What each member and each method does to the objective of the search's complete candidates.

    `difference` is the plain one, with the company that the search gave it: a good method's members look good.
    `adjusted` is the coefficient of a least-squares fit of the objective on all members and methods at once, methods
    relative to their mean, with its `standard_error`; NaN where it cannot be told apart from others.

    Returns:
        A row for each, methods first: `kind`, `name`, `count`, `mean_with`, `mean_without`, `difference`, `adjusted`,
        `standard_error`.
    """
    tried = candidates(table, searched_split(table))
    methods = pd.get_dummies(tried["method"]).sort_index(axis=1).astype(float)
    members = tried["members"].str.get_dummies(MEMBERS_JOINT).sort_index(axis=1).astype(float)
    objective = tried["objective"].to_numpy()
    parts = np.hstack([methods.to_numpy(), members.to_numpy()])
    if not len(tried):
        names = ["kind", "name", "count", "mean_with", "mean_without", "difference", "adjusted", "standard_error"]
        return pd.DataFrame(columns=names)
    adjusted, errors = _least_squares(parts, objective, methods.shape[1])
    lines = []
    for i, (kind, name) in enumerate([*(("method", n) for n in methods), *(("member", n) for n in members)]):
        taking_part = parts[:, i] > 0
        mean_with = objective[taking_part].mean()
        mean_without = objective[~taking_part].mean() if not taking_part.all() else np.nan
        lines.append(
            {
                "kind": kind,
                "name": name,
                "count": int(taking_part.sum()),
                "mean_with": mean_with,
                "mean_without": mean_without,
                "difference": mean_with - mean_without,
                "adjusted": adjusted[i],
                "standard_error": errors[i],
            }
        )
    return pd.DataFrame(lines)


def evaluations_to_target(table: pd.DataFrame, targets: Sequence[float]) -> pd.DataFrame:
    """How much a campaign had spent when its best candidate reached each target, as `search.ledger.frame.history` has it.

    Returns:
        A row for each target: `target`, `candidates` and `examples` evaluated and `seconds` until then, the reaching
        candidate included; missing where it was never reached.
    """
    tried = history(table)
    lines: list[dict[str, Any]] = []
    for target in targets:
        reached = np.flatnonzero(tried["best"].to_numpy(dtype=np.float64) >= target)
        line: dict[str, Any] = {"target": target, "candidates": pd.NA, "examples": pd.NA, "seconds": np.nan}
        if len(reached):
            at = tried.iloc[int(reached[0])]
            line |= {"candidates": int(reached[0]) + 1, "examples": int(at["spent"]), "seconds": float(at["seconds"])}
        lines.append(line)
    return pd.DataFrame(lines, columns=["target", "candidates", "examples", "seconds"]).astype(
        {"candidates": "Int64", "examples": "Int64"}
    )


def compare(campaigns: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Campaigns side by side, the best first.

    Args:
        campaigns: Name → tidy frame.

    Returns:
        A row for each: `campaign`; `candidates` tried, `failed` of them; the winner's `method`, `members`, `objective`
        and `test` mean (NaN where it was not tested); `at`, its place in the order of finishing; all `examples`
        evaluated and `seconds` taken.
    """
    lines = []
    for name, rows in campaigns.items():
        tried, ranked = history(rows), candidates(rows)
        line: dict[str, Any] = {
            "campaign": name,
            "candidates": len(tried),
            "failed": int((tried["status"] == "failed").sum()),
            "examples": int(tried["spent"].iloc[-1]) if len(tried) else 0,
            "seconds": float(tried["seconds"].iloc[-1]) if len(tried) else 0.0,
        }
        if len(ranked):
            winner = ranked.iloc[0]
            tested = rows[(rows["split"] == "test") & (rows["candidate"] == winner["candidate"])]
            line |= {key: winner[key] for key in ("method", "members", "objective")}
            line["test"] = float(tested["mean"].iloc[0]) if len(tested) else np.nan
            line["at"] = int(np.flatnonzero(tried["candidate"] == winner["candidate"])[0]) + 1
        lines.append(line)
    names = ["campaign", "candidates", "failed", "method", "members", "objective", "test", "at", "examples", "seconds"]
    table = pd.DataFrame(lines, columns=names)
    return table.sort_values("objective", ascending=False, kind="stable").reset_index(drop=True)


def as_study(table: pd.DataFrame, *, every: bool = False, name: str | None = None) -> optuna.Study:
    """The search's candidates as a study in memory, for whatever Optuna can do with one.

    Parameters are named as the search names them; their ranges are those that were seen, and those that never vary
    are left out. A campaign of several objectives gives a study of several.

    Args:
        table: A tidy frame.
        every: Also candidates that failed or were pruned, and when each began and ended.
        name: The study's.
    """
    split = searched_split(table)
    tried = history(table) if every else candidates(table, split).sort_values("finished", kind="stable")
    lines = tried.to_dict("records")
    trials = [_parameters(line) for line in lines]
    seen: dict[str, set[Any]] = {}
    for parameters in trials:
        for parameter, value in parameters.items():
            seen.setdefault(parameter, set()).add(value)
    distributions = {parameter: _distribution(values) for parameter, values in seen.items() if len(values) > 1}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    several = list(columns(tried, "objective").values())
    several = several if len(several) > 1 else ["objective"]
    study = optuna.create_study(study_name=name, directions=["maximize"] * len(several))
    optuna.logging.set_verbosity(verbosity)
    for line, parameters, values in zip(lines, trials, tried[several].to_numpy(dtype=np.float64), strict=True):
        own = {parameter: value for parameter, value in parameters.items() if parameter in distributions}
        done = line["status"] == "complete"
        trial = optuna.create_trial(
            state=STATES[line["status"]],
            params=own,
            distributions={parameter: distributions[parameter] for parameter in own},
            values=values.tolist() if done else None,
            user_attrs={key: line[key] for key in ("candidate", "error") if every and isinstance(line[key], str)},
        )
        if every:
            trial.datetime_start, trial.datetime_complete = (
                line[key].to_pydatetime().astimezone().replace(tzinfo=None) for key in ("started", "finished")
            )
        study.add_trial(trial)
    return study


def _least_squares(parts: np.ndarray, objective: np.ndarray, methods: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and standard errors, the first `methods` ones relative to their mean; NaN where undetermined."""
    count, width = parts.shape
    inverse = np.linalg.pinv(parts.T @ parts)
    fitted = inverse @ parts.T @ objective
    # What is determined is what the projection on the row space leaves as it is.
    contrast = np.eye(width)
    contrast[:methods, :methods] -= 1 / methods
    projection = inverse @ parts.T @ parts
    known = np.abs(contrast @ projection - contrast).max(axis=1) < 1e-8
    freedom = count - np.linalg.matrix_rank(parts)
    variance = ((objective - parts @ fitted) ** 2).sum() / freedom if freedom > 0 else np.nan
    errors = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", contrast, inverse, contrast), 0.0) * variance)
    return np.where(known, contrast @ fitted, np.nan), np.where(known, errors, np.nan)


def _parameters(line: Mapping[Any, Any]) -> dict[str, Any]:
    """A candidate's parameters as the search names them."""
    method = line["method"]
    parameters = {"method": method, "members": line["members"]}
    for column, value in line.items():
        prefix, _, name = str(column).partition(".")
        if prefix in ("scaling", "parameter") and name and not pd.isna(value):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            middle = "scaling." if prefix == "scaling" else ""
            parameters[f"{method}.{middle}{name}"] = float(value) if number else value
    return parameters


def _distribution(values: set[Any]) -> BaseDistribution:
    if all(isinstance(value, float) for value in values):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(sorted(values, key=str))
