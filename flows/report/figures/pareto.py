"""The candidates between which several objectives do not decide."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from flows.report.figures.style import NEUTRAL, Palette, describe, finish, plain, thin
from flows.report.scales import percent
from flows.report.table import in_words
from search.ledger.row import Row
from search.objective import best, pareto

MOST_POINTS = 2000


def front(rows: Sequence[Row], looks: Palette) -> Any:
    """The first two objectives of every candidate, the Pareto front of all as a line; None for one objective."""
    ranked = [row for row in best(rows, len(rows)) if len(row.objectives) > 1]
    if not ranked:
        return None
    first, second = list(ranked[0].objectives)[:2]
    scales = [looks.scales.of_objective(name, ranked[0].scores) for name in (first, second)]
    figure = go.Figure()
    chosen = pareto(ranked)
    figure.add_scatter(
        x=[row.objectives[first] * scales[0] for row in chosen],
        y=[row.objectives[second] * scales[1] for row in chosen],
        mode="lines+markers",
        name="Pareto front",
        line={"color": NEUTRAL, "width": 2},
        marker={"symbol": "circle-open", "size": 14, "color": NEUTRAL},
        hoverinfo="skip",
    )
    points = thin(ranked, MOST_POINTS)
    for method in sorted({row.method for row in points}):
        own = [row for row in points if row.method == method]
        figure.add_scatter(
            x=[row.objectives[first] * scales[0] for row in own],
            y=[row.objectives[second] * scales[1] for row in own],
            text=[describe(row) for row in own],
            mode="markers",
            name=plain(in_words(method)),
            marker={"color": looks.color(method), "symbol": looks.mark(method), "size": 8, "opacity": 0.8},
            hovertemplate="%{text}<extra></extra>",
        )
    titles = [plain(name) + percent(times) for name, times in zip((first, second), scales, strict=True)]
    return finish(figure, 420, xaxis={"title": titles[0]}, yaxis={"title": titles[1]})
