"""How the search went: its history, what scaling factors did, which parameters mattered."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import optuna
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flows.report.figures.style import (
    NEUTRAL,
    STRONG,
    Palette,
    add_methods,
    describe,
    finish,
    objective_axis,
    plain,
    thin,
)
from flows.report.table import in_words, plain_average
from merging.mergers.weight_groups import factor
from merging.recipe import GROUP
from search.candidate import ANCHORS, searched_split
from search.ledger.analysis import as_study
from search.ledger.analysis import importance as importance_of
from search.ledger.frame import frame
from search.ledger.row import Row
from search.objective import best

MOST_POINTS = 2000
MOST_POINTS_A_METHOD = 200
MOST_MEMBERS = 8
FEWEST_TRIALS = 20
"""PED-ANOVA compares the best tenth with all: of fewer trials, that is one."""


def finished(rows: Sequence[Row]) -> list[Row]:
    """Candidates with an objective, as the search measured them, in the order in which they were finished."""
    return sorted(best(rows, len(rows), searched_split(rows)), key=lambda row: row.finished)


def history(rows: Sequence[Row], looks: Palette) -> Any:
    """Objective of every candidate in the order of finishing, and the best so far; None before the first.

    Where candidates are estimates from anchor examples, those that were confirmed on everything stand beside them.
    """
    done = finished(rows)
    if not done:
        return None
    times, title = objective_axis(done, looks)
    is_estimated = done[0].split == ANCHORS
    place = {row.candidate: i for i, row in enumerate(done, start=1)}
    figure = go.Figure()
    record = list(accumulate((_height(row, times) for row in done), max))
    figure.add_scatter(
        x=list(range(1, len(done) + 1)),
        y=record,
        mode="lines",
        name="best estimate so far" if is_estimated else "best so far",
        line={"shape": "hv", "color": NEUTRAL, "width": 2},
        hoverinfo="skip",
    )
    points = thin(done, MOST_POINTS)
    size = 10 if len(points) <= 200 else 6
    add_methods(figure, points, looks, lambda row: place[row.candidate], lambda row: _height(row, times), size)
    baselines = [row for row in done if row.origin == "anchor"]
    if baselines:
        figure.add_scatter(
            x=[place[row.candidate] for row in baselines],
            y=[_height(row, times) for row in baselines],
            mode="markers",
            name="baseline (a method's default)",
            marker={"symbol": "circle-open", "size": 16, "color": NEUTRAL, "line": {"width": 1.5}},
            hoverinfo="skip",
        )
    confirmed = [row for row in best(rows, len(rows)) if is_estimated and row.candidate in place]
    if confirmed:
        figure.add_scatter(
            x=[place[row.candidate] for row in confirmed],
            y=[_height(row, times) for row in confirmed],
            text=[f"confirmed on all examples<br>{describe(row)}" for row in confirmed],
            mode="markers",
            name="confirmed on all examples",
            marker={"symbol": "x", "size": 10, "color": NEUTRAL},
            hovertemplate="%{text}<extra></extra>",
        )
    if (average := plain_average(rows, done[0].split)) is not None:
        figure.add_hline(
            y=_height(average, times),
            line={"color": NEUTRAL, "width": 1, "dash": "dot"},
            annotation={"text": "plain average", "xanchor": "right", "font": {"size": 11}},
        )
    return finish(
        figure,
        420,
        xaxis={"title": "candidate, in order of finishing"},
        yaxis={"title": title},
    )


def scaling(rows: Sequence[Row], looks: Palette) -> Any:
    """Objective against scaling factor, a row of panels for each method; None where no factor varies."""
    done = finished(rows)
    by_method = {
        method: thin([row for row in done if row.method == method], MOST_POINTS_A_METHOD)
        for method in sorted({row.method for row in done})
    }
    by_method = {method: own for method, own in by_method.items() if _varies(own)}
    if not by_method:
        return None
    times, title = objective_axis(done, looks)
    shared = all(len(set(row.scaling.values())) <= 1 for own in by_method.values() for row in own)
    counts = Counter(key for row in done for key in row.scaling)
    grouped = {key.partition(GROUP)[0] for key in counts if GROUP in key}
    keys = [key for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if key not in grouped]
    panels: list[str | None] = [None] if shared else [*sorted(keys[:MOST_MEMBERS])]
    figure = make_subplots(
        rows=len(by_method),
        cols=len(panels),
        shared_xaxes=True,
        shared_yaxes="all",
        horizontal_spacing=0.012,
        vertical_spacing=min(0.03, 0.5 / len(by_method)),
        column_titles=["all members" if panel is None else plain(panel).replace(GROUP, "<br>") for panel in panels],
        x_title="scaling factor",
        y_title=title,
    )
    for i, (method, own) in enumerate(by_method.items(), start=1):
        for j, panel in enumerate(panels, start=1):
            shown = [row for row in own if _factor(row, panel) is not None]
            figure.add_scatter(
                x=[_factor(row, panel) for row in shown],
                y=[_height(row, times) for row in shown],
                text=[describe(row) for row in shown],
                mode="markers",
                name=plain(in_words(method)),
                legendgroup=method,
                showlegend=j == 1,
                marker={
                    "color": looks.color(method),
                    "symbol": looks.mark(method),
                    "size": 6,
                    "opacity": 0.8,
                },
                hovertemplate="%{text}<extra></extra>",
                row=i,
                col=j,
            )
    figure = finish(figure, 150 + 120 * len(by_method))
    figure.update_annotations(font={"size": 13})
    figure.update_layout(margin={"l": 64, "b": 56, "t": 90}, legend={"y": 1 + 34 / (120 * len(by_method))})
    return figure


def _height(row: Row, times: int) -> float:
    return (row.objective or 0.0) * times


def _factor(row: Row, panel: str | None) -> float | None:
    """The scaling factor that a panel shows; a member's only one stands for that of each of its groups."""
    if panel is None:
        return next(iter(row.scaling.values()), None)
    member, _, group = panel.partition(GROUP)
    return factor(row.scaling, member, group)


def _varies(rows: Sequence[Row]) -> bool:
    return len({tuple(sorted(row.scaling.items())) for row in rows}) > 1


def importance(rows: Sequence[Row]) -> Any:
    """Which parameters the best tenth of the candidates differs in from the rest, by conditional PED-ANOVA.

    None where there are fewer than 20 finished candidates, or nothing varied.

    Args:
        rows: The ledger.
    """
    source = as_study(frame(rows))
    if len(source.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))) < FEWEST_TRIALS:
        return None
    shares = importance_of(source)
    top = [(name, share) for name, share in shares.items() if share >= 0.005][:20][::-1]
    if not top:
        return None
    figure = go.Figure(
        go.Bar(
            x=[share for _, share in top],
            y=[plain(name) for name, _ in top],
            orientation="h",
            marker={"color": STRONG},
            text=[f"{share:.0%}" for _, share in top],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
        )
    )
    return finish(
        figure,
        80 + 26 * len(top),
        xaxis={"title": "share of importance", "tickformat": ".0%", "range": [0, 1.15 * top[-1][1]]},
        bargap=0.3,
        showlegend=False,
    )
