"""The candidates between which several objectives do not decide."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from flows.report.figures.style import NEUTRAL, Palette, add_methods, finish, plain, thin
from flows.report.scales import percent
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

    def x(row: Row) -> float:
        return row.objectives[first] * scales[0]

    def y(row: Row) -> float:
        return row.objectives[second] * scales[1]

    figure = go.Figure()
    chosen = pareto(ranked)
    figure.add_scatter(
        x=list(map(x, chosen)),
        y=list(map(y, chosen)),
        mode="lines+markers",
        name="Pareto front",
        line={"color": NEUTRAL, "width": 2},
        marker={"symbol": "circle-open", "size": 14, "color": NEUTRAL},
        hoverinfo="skip",
    )
    add_methods(figure, thin(ranked, MOST_POINTS), looks, x, y, 8)
    titles = [plain(name) + percent(times) for name, times in zip((first, second), scales, strict=True)]
    return finish(figure, 420, xaxis={"title": titles[0]}, yaxis={"title": titles[1]})
