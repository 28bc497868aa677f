"""Tables as people read them: cells as text, a table in Markdown or in a terminal."""

import math

from radt.evaluation.metrics import Score
from radt.evaluation.results import Cell, Estimate, Table
from radt.evaluation.svg_plot import number_text

MOST_PLACES = 6


def cell_of(score: Score) -> Cell:
    """A score as a cell: an estimate where its interval is known."""
    if score.low is None or score.high is None:
        return score.value
    return Estimate(value=score.value, low=score.low, high=score.high)


def cell_text(cell: Cell) -> str:
    """A number in few figures, an estimate with its interval, a dash for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, Estimate):
        form = _form(cell)
        return f"{cell.value:{form}} ({cell.low:{form}} to {cell.high:{form}})"
    return number_text(cell) if isinstance(cell, int | float) else cell


def _form(cell: Estimate) -> str:
    """As many decimals as give an interval two figures of width; shares of so many trials as one has get two.

    Where that rounds to nothing what is not 0, three figures.
    """
    width = cell.high - cell.low
    is_share = cell.low >= 0 and cell.high <= 1 and width > 0.02
    wanted = 2 if is_share or width <= 0 else max(0, 1 - math.floor(math.log10(width)))
    places = min(MOST_PLACES, wanted)
    is_lost = any(0 < abs(each) < 0.5 * 10**-places for each in (cell.value, cell.low, cell.high))
    return ".3g" if is_lost and (wanted > places or width <= 0) else f".{places}f"


def markdown_table(table: Table) -> str:
    """Head, rule and rows; the first column stands left, the others right."""
    head = "| " + " | ".join(map(escape_markdown, table.columns)) + " |"
    rule = "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"
    rows = ["| " + " | ".join(escape_markdown(cell_text(cell)) for cell in row) + " |" for row in table.rows]
    return "\n".join([head, rule, *rows])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def table_lines(table: Table) -> list[str]:
    """A table for the terminal: columns as wide as they need."""
    rows = [table.columns, *(tuple(map(cell_text, row)) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    lines = ["  ".join(_aligned(row[i], width, i) for i, width in enumerate(widths)) for row in rows]
    return [table.title, *(line.rstrip() for line in lines), *([table.note] if table.note else [])]


def _aligned(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
