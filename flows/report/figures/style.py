"""One look for all figures: a method has its colour and mark everywhere, readable on light and dark."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flows.report.scales import Scales, percent
from flows.report.table import in_words, objective_scale
from merging.recipe import nested
from search.candidate import ANCHORS
from search.ledger.row import Row

# Okabe and Ito's palette, told apart with any colour vision; black and yellow, which vanish on dark or light,
# give way to purple and grey.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7F8C8D")
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
NEUTRAL = "#8A8F98"
STRONG = "#0072B2"
SCALE = "Cividis"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Palette:
    """Colours and marks of the methods of a ledger.

    Args:
        rows: All rows; the order of their methods' names decides.
        scales: How scores are shown; by default as shares.
    """

    def __init__(self, rows: Iterable[Row], scales: Scales | None = None) -> None:
        self.scales = scales or Scales()
        methods = {row.method for row in rows if row.origin in ("anchor", "search")}
        self._order = {method: i for i, method in enumerate(sorted(methods))}

    def color(self, method: str) -> str:
        """A colour as #rrggbb."""
        return PALETTE[self._order[method] % len(PALETTE)] if method in self._order else NEUTRAL

    def mark(self, method: str) -> str:
        """A plotly marker symbol; it differs too, where colours come round again."""
        i = self._order.get(method, 0)
        return MARKS[(i + i // len(PALETTE)) % len(MARKS)]


def plain(value: object) -> str:
    """Text that plotly shows as it stands, though it reads labels as HTML."""
    return escape(str(value), quote=False)


def number(value: object) -> str:
    """A parameter's value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _factors(member: str, given: float | Mapping[str, float]) -> str:
    """A member's scaling factor, or those of its groups of weights."""
    if isinstance(given, Mapping):
        return f"{plain(member)}: " + ", ".join(f"{plain(group)} {value:.2f}" for group, value in given.items())
    return f"{plain(member)} {given:.2f}"


def describe(row: Row) -> str:
    """A recipe in a few lines, for what appears under the pointer."""
    by_member = nested(row.scaling)
    between = "<br>" if len(by_member) < len(row.scaling) else ", "  # groups of weights make long lines
    scaling = between.join(_factors(member, given) for member, given in by_member.items())
    parameters = ", ".join(f"{plain(name)} {plain(number(value))}" for name, value in row.parameters.items())
    objective = "" if row.objective is None else f"objective {row.objective:.4f}"
    return "<br>".join(
        part for part in (f"<b>{plain(in_words(row.method))}</b>", objective, scaling, parameters) if part
    )


def objective_axis(rows: Sequence[Row], looks: Palette) -> tuple[int, str]:
    """What objectives are multiplied by to be read, and the title of their axis, which says where they are estimates."""
    times = objective_scale(rows, looks.scales)
    estimated = "estimated " if any(row.split == ANCHORS for row in rows) else ""
    return times, f"{estimated}validation objective" + percent(times)


def thin(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, in order: the best half of the number, and every nth of the rest."""
    if len(rows) <= most:
        return list(rows)
    by_objective = sorted(range(len(rows)), key=lambda i: -(rows[i].objective or 0.0))
    kept, rest = by_objective[: most // 2], sorted(by_objective[most // 2 :])
    step = -(-len(rest) // (most - len(kept)))
    return [rows[i] for i in sorted([*kept, *rest[::step]])]


def add_methods(
    figure: Any, rows: Sequence[Row], looks: Palette, x: Callable[[Row], float], y: Callable[[Row], float], size: int
) -> None:
    """Draws candidates as points, each method by its colour and mark, recipes under the pointer."""
    for method in sorted({row.method for row in rows}):
        own = [row for row in rows if row.method == method]
        figure.add_scatter(
            x=list(map(x, own)),
            y=list(map(y, own)),
            text=list(map(describe, own)),
            mode="markers",
            name=plain(in_words(method)),
            marker={"color": looks.color(method), "symbol": looks.mark(method), "size": size, "opacity": 0.8},
            hovertemplate="%{text}<extra></extra>",
        )


def finish(figure: Any, height: int, **layout: Any) -> Any:
    """Gives a figure the layout that all share; colours of text and lines are set in the browser."""
    figure.update_layout(
        template="none",
        height=height,
        font={"family": FONT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 32 if layout.get("showlegend") is False else 64, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"size": 12}},
        hoverlabel={"align": "left", "font": {"family": FONT, "size": 12}},
        **layout,
    )
    axes = {
        "automargin": True,
        "zeroline": False,
        "ticks": "",
        "title": {"standoff": 10, "font": {"size": 13}},
    }
    figure.update_xaxes(axes)
    figure.update_yaxes(axes)
    return figure
