"""What was chosen by validation, on test: whoever lies below the others' line was lucky on validation."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from flows.report.figures.style import NEUTRAL, Palette, finish, plain
from flows.report.scales import percent
from flows.report.significance import Compared, in_words, scale
from flows.report.table import text

NAMES = {"member": "members", "average": "plain average", "method": "best of a method", "runner-up": "runners-up"}


def beside(compared: Sequence[Compared], looks: Palette) -> Any:
    """Test against validation with standard errors, the winner ringed; None where nothing was measured on both."""
    if not compared:
        return None
    times = scale(compared)
    ends = [cell.value * times for entry in compared for cell in (entry.validation, entry.test)]
    figure = go.Figure()
    figure.add_scatter(
        x=[min(ends), max(ends)],
        y=[min(ends), max(ends)],
        mode="lines",
        name="test = validation",
        line={"color": NEUTRAL, "width": 1, "dash": "dot"},
        hoverinfo="skip",
    )
    for kind in ("member", "average", "method", "runner-up", "winner"):
        own = [entry for entry in compared if entry.line.kind == kind]
        if not own:
            continue
        winner = kind == "winner"
        figure.add_scatter(
            x=[entry.validation.value * times for entry in own],
            y=[entry.test.value * times for entry in own],
            error_x=_whiskers([entry.validation.standard_error * times for entry in own]),
            error_y=_whiskers([entry.test.standard_error * times for entry in own]),
            mode="markers+text" if winner else "markers",
            name=plain(own[0].line.label) if winner else NAMES[kind],
            text=["winner"] if winner else None,
            textposition="top center",
            hovertext=[_words(entry) for entry in own],
            marker={
                "color": [looks.color(entry.line.row.method) for entry in own],
                "symbol": [looks.mark(entry.line.row.method) for entry in own],
                "size": 14 if winner else 9,
                "line": {"width": 2 if winner else 0, "color": NEUTRAL},
            },
            hovertemplate="%{hovertext}<extra></extra>",
        )
    return finish(
        figure,
        420,
        xaxis={"title": f"validation mean{percent(times)}"},
        yaxis={"title": f"test mean{percent(times)}"},
    )


def _whiskers(errors: Sequence[float]) -> dict[str, Any]:
    """Standard errors in one colour: they would take the markers' list of colours for one."""
    return {"array": list(errors), "thickness": 1, "color": NEUTRAL}


def _words(entry: Compared) -> str:
    """A line's numbers, for what appears under the pointer."""
    behind = f"<br>winner − this: {in_words(entry.behind)}" if entry.behind else ""
    return f"<b>{plain(entry.line.label)}</b><br>validation {text(entry.validation)}<br>test {text(entry.test)}{behind}"
