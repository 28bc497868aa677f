"""Plots as SVG: lines, points and bands of 95 %, which scale, and which need nothing to be drawn."""

import html
import math
from collections.abc import Iterable, Iterator, Sequence

from radt.evaluation.results import Line, Plot

COLORS = ("#0b61a4", "#b35900", "#1a7f37", "#8250df", "#cf222e", "#57606a", "#0a7ea4", "#bf3989")
SOFT, INK = "#57606a", "#1b1f24"
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 52
TICKS = 5


def draw_plot(plot: Plot) -> str:
    """Lines, points and bands of 95 % as SVG, which scales, and which needs nothing to be drawn."""
    x_axis = _Axis.of(_all_x(plot), log=plot.log_x, start=LEFT, end=WIDTH - RIGHT)
    y_axis = _Axis.of(_all_y(plot), log=plot.log_y, start=HEIGHT - BOTTOM, end=TOP)
    parts = [*_grid(x_axis, y_axis, plot)]
    for place, (line, color) in enumerate(zip(plot.lines, _colors(plot.lines), strict=True)):
        parts += [*_draw_line(line, color, x_axis, y_axis), _legend(line, color, place)]
    height = HEIGHT + 20 * len(plot.lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="{html.escape(plot.title)}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


class _Axis:
    """From numbers to places on the page."""

    def __init__(self, low: float, high: float, *, log: bool, start: float, end: float) -> None:
        self.low, self.high, self.log, self.start, self.end = low, high, log, start, end

    @classmethod
    def of(cls, values: Iterable[float], *, log: bool, start: float, end: float) -> "_Axis":
        finite = [value for value in values if math.isfinite(value) and (not log or value > 0)]
        shown = [math.log10(value) if log else value for value in finite]
        low, high = min(shown, default=0.0), max(shown, default=1.0)
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(low, high, log=log, start=start, end=end)

    def place(self, value: float) -> float | None:
        """None for what a logarithm cannot show."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        number = math.log10(value) if self.log else value
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers: powers of ten, or steps of 1, 2 or 5."""
        if self.log and self.high - self.low >= 1:
            return [10.0**i for i in range(math.ceil(self.low), math.floor(self.high) + 1)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough)
        return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _all_x(plot: Plot) -> list[float]:
    return [x for line in plot.lines for x in line.x]


def _all_y(plot: Plot) -> list[float]:
    return [y for line in plot.lines for ys in (line.y, line.low, line.high) for y in ys]


def _colors(lines: Sequence[Line]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(lines))]


def _grid(x_axis: _Axis, y_axis: _Axis, plot: Plot) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    for tick in y_axis.ticks():
        y = y_axis.place(tick) or 0.0
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>'
        yield _text(number_text(tick), LEFT - 8, y + 4, SOFT, anchor="end")
    for tick in x_axis.ticks():
        x = x_axis.place(tick) or 0.0
        yield f'<path d="M{x:.1f} {bottom}v5" stroke="#8b949e"/>'
        yield _text(number_text(tick), x, bottom + 19, SOFT)
    middle = (TOP + bottom) / 2
    yield _text(plot.x, (LEFT + WIDTH - RIGHT) / 2, bottom + 40, INK)
    yield _text(plot.y, 14, middle, INK, turn=f' transform="rotate(-90 14 {middle:.1f})"')


def _text(text: str, x: float, y: float, color: str, *, anchor: str = "middle", turn: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{turn}'
    return f"<text {place}>{html.escape(text)}</text>"


def _draw_line(line: Line, color: str, x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(line.x, values, strict=True)]
        return [(x, y) for x, y in places if x is not None and y is not None]

    if line.low:
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*points(line.low), *reversed(points(line.high))])
        yield f'<polygon points="{band}" fill="{color}" opacity="0.13"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points(line.y))
    yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
    if len(line.x) <= 40:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points(line.y))


def _legend(line: Line, color: str, place: int) -> str:
    y = HEIGHT + 4 + 20 * place
    return f'<path d="M{LEFT} {y}h22" stroke="{color}" stroke-width="3"/>' + _text(
        line.name, LEFT + 30, y + 4, INK, anchor="start"
    )


def number_text(value: float) -> str:
    """As short as people want it: `1,824`, `0.84`, `3.1e-05`; what is no finite number by its name."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e15):
        return f"{value:,.0f}"
    if 0.01 <= abs(value) < 1:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:,.2f}" if 1 <= abs(value) < 1e6 else f"{value:.3g}"
