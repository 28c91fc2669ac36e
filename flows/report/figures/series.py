"""Small figures as SVG, in the report's colours, readable on light and dark."""

from collections.abc import Mapping, Sequence
from html import escape

from flows.report.figures.style import FONT, NEUTRAL, PALETTE

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 52
LINE = 18
"""Height of a line of the legend."""

Points = Sequence[tuple[float, float, float]]
"""x, y and the standard error of y."""


def draw(series: Mapping[str, Points], labels: tuple[str, str], *, lines: bool) -> str:
    """A figure of several series.

    Args:
        series: Name → points.
        labels: Of the axes.
        lines: Whether a series' points are joined.
    """
    every = [point for points in series.values() for point in points]
    xs = _span([x for x, _, _ in every])
    ys = _span([y + sign * (e if e == e else 0.0) for _, y, e in every for sign in (-1, 1)])
    height = HEIGHT + LINE * len(series)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[1] - xs[0])
        up = (y - ys[0]) / (ys[1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="{escape(FONT)}" font-size="12" '
        f'fill="{NEUTRAL}" role="img">',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="{NEUTRAL}"/>',
    ]
    for value in _ticks(*xs):
        x, _ = at(value, ys[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(*ys):
        _, y = at(xs[0], value)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{NEUTRAL}" stroke-opacity="0.2"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{escape(labels[0])}</text>')
    down = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{down}" text-anchor="middle" transform="rotate(-90 14 {down})">{escape(labels[1])}</text>'
    )
    for number, (name, points) in enumerate(series.items()):
        color = PALETTE[number % len(PALETTE)]
        places = [at(x, y) for x, y, _ in sorted(points)]
        if lines:
            joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path d="M{joined}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y, error in points:
            if error == error and lines:
                (px, low), (_, high) = at(x, y - error), at(x, y + error)
                parts.append(f'<path d="M{px:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-opacity="0.6"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
        below = HEIGHT + LINE * number + 6
        parts.append(f'<circle cx="{LEFT + 6}" cy="{below}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{below + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, about five."""
    rough = (high - low) / 5
    size = 10.0 ** len(f"{int(rough)}") / 10 if rough >= 1 else 1.0
    while size > rough:
        size /= 10
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = int(low / step) - 1
    return [round(i * step, 10) for i in range(first, first + 20) if low <= i * step <= high]
