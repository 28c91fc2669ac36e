"""What the members contribute: who is among the best, how they differ, what each task gains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flows.report.figures.style import NEUTRAL, SCALE, STRONG, Palette, finish, plain
from flows.report.scales import digits
from flows.report.table import in_words, plain_average
from search.candidate import searched_split
from search.ledger.distinct import apart
from search.ledger.row import Row
from search.objective import best
from search.subsets.choose_subsets import Selection

MOST_WRITTEN = 12
"""Up to this many members or tasks, cells hold their numbers."""


def share(rows: Sequence[Row]) -> Any:
    """How often each member is in the best tenth of the candidates and in all; None before the first."""
    ranked = best(rows, len(rows), searched_split(rows))
    if not ranked:
        return None
    top = ranked[: max(1, -(-len(ranked) // 10))]
    members = sorted({member for row in ranked for member in row.members}, reverse=True)
    figure = go.Figure()
    for name, group, color in (("all candidates", ranked, NEUTRAL), ("best tenth", top, STRONG)):
        parts = [sum(member in row.members for row in group) / len(group) for member in members]
        figure.add_bar(
            x=parts,
            y=[plain(member) for member in members],
            orientation="h",
            name=f"{name} ({len(group)})",
            marker={"color": color},
            hovertemplate="%{y}: %{x:.0%}<extra></extra>",
        )
    figure = finish(
        figure,
        90 + _height(len(members)) * len(members),
        xaxis={"title": "share of candidates that it takes part in", "tickformat": ".0%", "range": [0, 1.02]},
        barmode="group",
        bargap=0.3,
    )
    figure.update_layout(legend={"traceorder": "reversed"})
    return figure


def _height(members: int) -> int:
    """Pixels of a member's line: less where there are many."""
    return max(22, min(40, 720 // max(1, members)))


def similarity(selection: Selection | None) -> Any:
    """S as a heat map with the members' q beside it; None where the selection used neither."""
    if selection is None or selection.similarity is None:
        return None
    names = [plain(name) for name in selection.names]
    S = np.array(selection.similarity)
    values = [[None if i == j else float(S[i, j]) for j in range(len(S))] for i in range(len(S))]
    written = len(names) <= MOST_WRITTEN
    figure = make_subplots(cols=2, column_widths=[0.72, 0.28], shared_yaxes=True, horizontal_spacing=0.16)
    figure.add_heatmap(
        z=values,
        x=names,
        y=names,
        colorscale=SCALE,
        texttemplate="%{z:.2f}" if written else None,
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        colorbar={
            "title": {"text": "S", "font": {"size": 13}},
            "x": 0.625,
            "thickness": 12,
            "len": 1.0,
            "outlinewidth": 0,
        },
        xgap=2,
        ygap=2,
        row=1,
        col=1,
    )
    figure.add_bar(
        x=[selection.quality.get(name, 0.0) for name in selection.names],
        y=names,
        orientation="h",
        marker={"color": STRONG},
        text=[f"{selection.quality[name]:.2f}" if name in selection.quality else "" for name in selection.names],
        textposition="auto",
        hovertemplate="%{y}: q = %{x:.3f}<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(title="similarity S", showgrid=False, row=1, col=1)
    figure.update_xaxes(title="quality q", rangemode="tozero", row=1, col=2)
    return finish(figure, 150 + _height(len(names)) * len(names), showlegend=False, bargap=0.35)


def profile(rows: Sequence[Row], tasks: Sequence[str], looks: Palette, top: int = 10) -> Any:
    """Validation scores of the best candidates, task by task, coloured by the gain over the plain average."""
    shown = apart(best(rows, len(rows)))[:top]
    if not shown or not tasks:
        return None
    average = plain_average(rows)
    scores = np.array([[row.scores.get(task, np.nan) for task in tasks] for row in shown])
    start = np.array([average.scores.get(task, np.nan) if average else np.nan for task in tasks])
    known = bool(np.isfinite(start).all())
    times = np.array([looks.scales.of_task(task) for task in tasks])
    colors = (scores - start if known else scores) * times
    reach = max(float(np.nanmax(np.abs(colors))), 1e-9)
    title = "gain" if known else "score"
    labels = [f"{place}. {plain(in_words(row.method))}" for place, row in enumerate(shown, start=1)]
    figure = go.Figure(
        go.Heatmap(
            z=colors.tolist(),
            x=[plain(task) for task in tasks],
            y=labels,
            text=[
                [f"{value * scale:.{digits(scale)}f}" for value, scale in zip(line, times.tolist(), strict=True)]
                for line in scores
            ],
            texttemplate="%{text}" if len(tasks) <= MOST_WRITTEN else None,
            hovertemplate="%{y}<br>%{x}: %{text}<extra></extra>",
            colorscale="RdBu" if known else SCALE,
            zmin=-reach if known else None,
            zmax=reach if known else None,
            colorbar={
                "title": {"text": title, "font": {"size": 13}}, "thickness": 12, "outlinewidth": 0,
            },
            xgap=2,
            ygap=2,
        )
    )  # fmt: skip
    figure = finish(figure, 100 + 34 * len(shown), yaxis={"autorange": "reversed"}, showlegend=False)
    figure.update_xaxes(showgrid=False, side="top")
    figure.update_yaxes(showgrid=False)
    figure.update_layout(margin={"t": 64})
    return figure
