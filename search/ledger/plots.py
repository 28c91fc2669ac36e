"""The answers of `search.ledger.analysis` as plotly figures; Optuna's own where it has one."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pandas as pd
import plotly.graph_objects as go

from search.ledger import analysis
from search.ledger.frame import candidates, columns
from search.ledger.frame import history as told

SPENT = {"candidates": "candidates evaluated", "examples": "examples evaluated", "seconds": "seconds"}


def history(source: optuna.Study | pd.DataFrame) -> Any:
    """Every candidate's objective and the best so far: Optuna's `plot_optimization_history`."""
    return optuna.visualization.plot_optimization_history(
        _study(source), target=lambda trial: trial.values[0], target_name="objective"
    )


def importance(source: optuna.Study | pd.DataFrame, evaluator: analysis.Evaluator = "ped-anova") -> Any:
    """Shares of importance of the search's parameters, as `analysis.importance` has them."""
    shares = analysis.importance(source, evaluator)[::-1]
    figure = go.Figure(go.Bar(x=shares.to_list(), y=[str(name) for name in shares.index], orientation="h"))
    return figure.update_layout(title=f"Importance ({evaluator})", xaxis_title="share", xaxis_tickformat=".0%")


def slices(source: optuna.Study | pd.DataFrame, parameters: Sequence[str] | None = None) -> Any:
    """The objective against each parameter: Optuna's `plot_slice`."""
    return optuna.visualization.plot_slice(
        _study(source),
        params=list(parameters) if parameters is not None else None,
        target=lambda trial: trial.values[0],
        target_name="objective",
    )


def pareto_front(table: pd.DataFrame, x: str | None = None, y: str | None = None) -> Any:
    """Two columns against each other, with the candidates that no other one beats in both.

    Args:
        table: A tidy frame.
        x: A column; by default the first task's score.
        y: Another; by default the second task's.
    """
    tasks = list(columns(table, "score").values())
    across, up = x or tasks[0], y or tasks[min(1, len(tasks) - 1)]
    tried = candidates(table)
    front = analysis.pareto_front(table, [across, up]).sort_values(across)
    figure = go.Figure()
    for name, shown, mode in (("candidates", tried, "markers"), ("front", front, "lines+markers")):
        figure.add_scatter(
            x=shown[across].to_list(),
            y=shown[up].to_list(),
            mode=mode,
            name=name,
            text=(shown["method"] + " " + shown["members"]).to_list(),
        )
    return figure.update_layout(title="Pareto front", xaxis_title=across, yaxis_title=up)


def best(table: pd.DataFrame, top: int = 5) -> Any:
    """Each task's score of the best candidates on validation, with standard errors."""
    ranked = analysis.best(table, top)
    tasks = columns(ranked, "score")
    figure = go.Figure()
    for place, line in enumerate(ranked.to_dict("records"), start=1):
        errors = [line.get(f"standard_error.{task}") for task in tasks]
        figure.add_scatter(
            x=list(tasks),
            y=[line[column] for column in tasks.values()],
            error_y={"array": errors, "thickness": 1},
            mode="markers",
            name=f"{place}. {line['method']} {line['members']}",
        )
    return figure.update_layout(
        title="The best on validation", yaxis_title="score", scattermode="group", xaxis_type="category"
    )


def validation_beside_test(table: pd.DataFrame) -> Any:
    """Test against validation of what was measured on both, as `analysis.validation_beside_test` has it."""
    both = analysis.validation_beside_test(table)
    figure = go.Figure()
    for origin, own in both.groupby("origin", sort=False):
        figure.add_scatter(
            x=own["validation"].to_list(),
            y=own["test"].to_list(),
            error_y={"array": own["standard_error"].to_list(), "thickness": 1},
            mode="markers",
            name=str(origin),
            text=(own["method"] + " " + own["members"]).to_list(),
        )
    ends = [both["validation"].min(), both["validation"].max()]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"dash": "dot"}, name="test = validation")
    return figure.update_layout(
        title="Validation beside test", xaxis_title="validation mean", yaxis_title="test mean (± of the difference)"
    )


def marginal_effects(table: pd.DataFrame) -> Any:
    """Adjusted effects of methods and members with their standard errors, as `analysis.marginal_effects` has them."""
    effects = analysis.marginal_effects(table)
    figure = go.Figure()
    for kind in ("method", "member"):
        own = effects[effects["kind"] == kind][::-1]
        figure.add_bar(
            x=own["adjusted"].to_list(),
            y=own["name"].to_list(),
            error_x={"array": own["standard_error"].to_list()},
            orientation="h",
            name=kind,
        )
    return figure.update_layout(title="Marginal effects", xaxis_title="effect on the objective")


def compare(campaigns: Mapping[str, pd.DataFrame], spent: str = "candidates") -> Any:
    """The best objective of each campaign against what it had spent: the evaluations-to-target curves.

    Args:
        campaigns: Name → tidy frame.
        spent: `candidates`, `examples` or `seconds`.
    """
    figure = go.Figure()
    for name, rows in campaigns.items():
        line = told(rows)
        along = {"candidates": range(1, len(line) + 1), "examples": line["spent"], "seconds": line["seconds"]}[spent]
        figure.add_scatter(x=list(along), y=line["best"].to_list(), mode="lines", line={"shape": "hv"}, name=name)
    return figure.update_layout(xaxis_title=SPENT[spent], yaxis_title="best objective", showlegend=True)


def _study(source: optuna.Study | pd.DataFrame) -> optuna.Study:
    return analysis.as_study(source) if isinstance(source, pd.DataFrame) else source
