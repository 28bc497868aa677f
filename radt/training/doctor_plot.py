"""The picture of `radt doctor RUN`: what was logged, beside the reference curve of the preset."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.atomic import write_bytes
from index.errors import MissingExtraError
from radt.training.doctor import Diagnosis
from radt.training.run_folder import History, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, REFERENCE, SOFT = "#0b61a4", "#b35900", "#57606a"
PANEL = (4.6, 3.8)  # inches
DOTS_AN_INCH = 110


def draw_diagnosis(diagnosis: Diagnosis, path: Path) -> Path:
    """Write a PNG: a row for each phase; loss, gradient and the worth of neighbours over the images seen."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise MissingExtraError("drawing curves needs matplotlib: pip install 'radt[eval]'") from error
    rows = max(1, len(diagnosis.histories))
    drawers = [_draw_loss, _draw_gradient]
    if any(history.probes or (history.curve and history.curve.life) for history in diagnosis.histories):
        drawers.append(_draw_life)
    size = len(drawers) * PANEL[0], rows * PANEL[1]
    figure = Figure(figsize=size, dpi=DOTS_AN_INCH, layout="constrained")
    panels: Any = figure.subplots(rows, len(drawers), squeeze=False)
    figure.suptitle(f"{diagnosis.folder.name}: a run of {diagnosis.preset}", color=SOFT)
    for row, history in zip(panels, diagnosis.histories, strict=False):
        for axes, draw in zip(row, drawers, strict=True):
            draw(axes, history)
    for axes in panels.flat:
        axes.set_xlabel("images seen", color=SOFT)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(visible=True, color="#e3e6ea")
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
    return path


def _draw_loss(axes: "Axes", history: History) -> None:
    axes.set_title(f"loss {history.phase}".strip())
    if history.curve is not None:
        points = history.curve.points
        x = [point.images_seen for point in points]
        low, high = [point.loss_low for point in points], [point.loss_high for point in points]
        axes.fill_between(x, low, high, color=REFERENCE, alpha=0.15, linewidth=0)
        axes.plot(x, [point.loss for point in points], color=REFERENCE, label="reference, and nine tenths of it")
    axes.plot(*_xy(history.lines, "loss"), color=OWN, linewidth=0.8, label="this run")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _draw_gradient(axes: "Axes", history: History) -> None:
    axes.set_title("norm of the gradient")
    for point in () if history.curve is None else history.curve.points:
        if point.grad_norm is not None:
            axes.plot([point.images_seen], [point.grad_norm], ".", color=REFERENCE, markersize=4)
    x, y = _xy(history.lines, "grad_norm")
    if y:
        axes.plot(x, y, color=OWN, linewidth=0.8)
        axes.set_yscale("log")


def _draw_life(axes: "Axes", history: History) -> None:
    axes.set_title("neighbours: worth, and attention to them")
    if history.curve is not None and history.curve.life:
        life = history.curve.life
        x, y = [each.images_seen for each in life], [each.gain for each in life]
        axes.plot(x, y, color=REFERENCE, marker=".", label="worth, in the reference")
    for name, label, style in (
        ("gain", "worth of a right one, of the loss", "-"),
        ("attention_right", "attention to a right one", "--"),
        ("attention_wrong", "attention to a wrong one", ":"),
    ):
        x, y = _xy(history.probes, name)
        if y:
            axes.plot(x, y, style, color=OWN, marker=".", label=label)
    axes.legend(frameon=False, fontsize=8)


def _xy(lines: Lines, name: str) -> tuple[list[float], list[float]]:
    """Where each number was logged, and the number; what is no number is left out."""
    kept = [line for line in lines if name in line and math.isfinite(line[name])]
    return [line["images_seen"] for line in kept], [line[name] for line in kept]
