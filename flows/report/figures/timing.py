"""Where the time went: seconds of merge and of evaluation, and what each worker did when."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flows.report.figures.style import Palette, describe, finish, plain
from flows.report.table import in_words
from search.candidate import searched_split
from search.ledger.row import Row

MOST_BARS = 3000
PANELS = (("merge_seconds", "seconds of merge"), ("evaluate_seconds", "seconds of evaluation"))


def seconds(rows: Sequence[Row], looks: Palette) -> Any:
    """Histograms of the seconds that merge and evaluation took; None where none was measured."""
    split = searched_split(rows)
    done = [row for row in rows if row.origin in ("anchor", "search") and row.split == split]
    if not any(getattr(row, name) is not None for row in done for name, _ in PANELS):
        return None
    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    for method in sorted({row.method for row in done}):
        for col, (name, title) in enumerate(PANELS, start=1):
            figure.add_histogram(
                x=[value for row in done if row.method == method and (value := getattr(row, name)) is not None],
                name=plain(in_words(method)),
                legendgroup=method,
                showlegend=col == 1,
                marker={"color": looks.color(method)},
                bingroup=col,
                hovertemplate="%{x} s: %{y}<extra>%{fullData.name}</extra>",
                row=1,
                col=col,
            )
            figure.update_xaxes(title=title, rangemode="tozero", row=1, col=col)
    figure.update_yaxes(title="candidates", row=1, col=1)
    return finish(figure, 320, barmode="stack", bargap=0.08)


def timeline(rows: Sequence[Row], looks: Palette) -> Any:
    """What each worker evaluated when, in minutes from the first; None where no worker is known."""
    known = sorted((row for row in rows if row.worker), key=lambda row: row.started)[-MOST_BARS:]
    if not known:
        return None
    start = known[0].started
    workers = sorted({row.worker for row in known if row.worker}, reverse=True)
    figure = go.Figure()
    for method in sorted({row.method for row in known}):
        own = [row for row in known if row.method == method]
        figure.add_bar(
            base=[(row.started - start).total_seconds() / 60 for row in own],
            x=[(row.finished - row.started).total_seconds() / 60 for row in own],
            y=[plain(row.worker) for row in own],
            text=[f"{describe(row)}<br>{row.split}, {row.status}" for row in own],
            orientation="h",
            name=plain(in_words(method)),
            marker={"color": looks.color(method), "line": {"width": 0.5, "color": "rgba(128,128,128,0.6)"}},
            hovertemplate="%{text}<extra></extra>",
            textposition="none",
        )
    return finish(
        figure,
        110 + 34 * len(workers),
        xaxis={"title": "minutes since the first evaluation", "rangemode": "tozero"},
        yaxis={"categoryorder": "array", "categoryarray": [plain(worker) for worker in workers]},
        barmode="overlay",
        bargap=0.3,
    )
