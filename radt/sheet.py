"""A contact sheet of prompts, the neighbours found for them, and the pictures drawn: one PNG and one HTML file.

A Sheet is a table of pictures; the two renderings show the same table. Small pictures are enlarged by whole factors
without smoothing, so that what is seen is what was drawn.
"""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from index.atomic import write_bytes

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

SCALE = 2  # device pixels a unit of the layout: sharp text on dense screens and in print
MARGIN = 36
GAP = 10  # between pictures
COLUMN_GAP = 34
ROW_GAP = 18
PROMPT_WIDTH = 190
PICTURE = 128
PICTURES_A_LINE = 4
INK, SOFT, FAINT, RULE = "#1b1f24", "#57606a", "#8b949e", "#e3e6ea"
NOTE_LINE = 15
TITLE_SIZE, SUBTITLE_SIZE, HEAD_SIZE, PROMPT_SIZE, NOTE_SIZE = 22, 13, 12, 15, 11


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image with a few short lines of text below it. In the PNG a long first line takes two, then dots."""

    image: Image.Image
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt: `cells` has a group of pictures for every column. An empty group shows a dash."""

    prompt: str
    cells: tuple[tuple[Picture, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The table. The prompt's own column comes first and is not named in `columns`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    subtitle: str = ""


def write_sheet(sheet: Sheet, path: Path) -> tuple[Path, Path]:
    """Write the PNG and the HTML beside each other, where `sheet_paths` says. Returns (png, html)."""
    png, page = sheet_paths(path)
    buffer = io.BytesIO()
    draw_sheet(sheet).save(buffer, "PNG", optimize=True)
    write_bytes(png, buffer.getvalue())
    write_bytes(page, render_html(sheet).encode())
    return png, page


def sheet_paths(path: Path) -> tuple[Path, Path]:
    """Where the PNG and the HTML of a sheet go, whatever of the two `path` ends in; any other dot is of its name."""
    name = path.stem if path.suffix.lower() in (".png", ".html") else path.name
    return path.with_name(f"{name}.png"), path.with_name(f"{name}.html")


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Fit into `side` x `side`: up by a whole factor with hard pixel edges, down with Lanczos."""
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > side:
        return image.resize(_scaled(image, side / longest), Image.Resampling.LANCZOS)
    return image.resize(_scaled(image, max(1, side // longest)), Image.Resampling.NEAREST)


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The sheet as one RGB image, dark text on white."""
    layout = _Layout(sheet)
    canvas = _Canvas(layout.width, layout.height)
    canvas.text((MARGIN, MARGIN), sheet.title, TITLE_SIZE, INK)
    if sheet.subtitle:
        canvas.text((MARGIN, MARGIN + 32), sheet.subtitle, SUBTITLE_SIZE, SOFT)
    for left, name in zip(layout.lefts, ("Prompt", *sheet.columns), strict=True):
        canvas.text((left, layout.head), name, HEAD_SIZE, FAINT)
    for row, (top, bottom) in zip(sheet.rows, pairwise(layout.tops), strict=True):
        canvas.rule(top - ROW_GAP // 2, layout.width)
        _draw_row(canvas, row, layout.lefts, top)
        assert bottom > top, (top, bottom)
    canvas.rule(layout.tops[-1] - ROW_GAP // 2, layout.width)
    return canvas.image


def _draw_row(canvas: "_Canvas", row: Row, lefts: Sequence[int], top: int) -> None:
    y = top + 2
    for line in wrap(row.prompt, PROMPT_SIZE, PROMPT_WIDTH, lines=5):
        canvas.text((lefts[0], y), line, PROMPT_SIZE, INK)
        y += PROMPT_SIZE + 6
    for line in wrap(row.note, NOTE_SIZE, PROMPT_WIDTH, lines=3):
        canvas.text((lefts[0], y + 4), line, NOTE_SIZE, FAINT)
        y += NOTE_LINE
    for left, pictures in zip(lefts[1:], row.cells, strict=True):
        if not pictures:
            canvas.text((left, top + 2), "-", PROMPT_SIZE, FAINT)
        for (x, y), picture in zip(_places(pictures, left, top), pictures, strict=True):
            canvas.picture((x, y), picture)


class _Layout:
    """Where everything goes: the left edge of each column, the top of each row and the end of the last."""

    def __init__(self, sheet: Sheet) -> None:
        self.head = MARGIN + (64 if sheet.subtitle else 44)
        self.lefts = [MARGIN]
        for column, name in enumerate(sheet.columns):
            previous = PROMPT_WIDTH if column == 0 else self._width(sheet, column - 1)
            self.lefts.append(self.lefts[-1] + previous + COLUMN_GAP)
            assert name, "a column needs a name"
        self.tops = [self.head + HEAD_SIZE + 2 * ROW_GAP // 2 + ROW_GAP // 2]
        for row in sheet.rows:
            self.tops.append(self.tops[-1] + max(map(_group_height, row.cells), default=0) + ROW_GAP)
        last = self._width(sheet, len(sheet.columns) - 1) if sheet.columns else PROMPT_WIDTH
        title = round(text_width(sheet.title, TITLE_SIZE)), round(text_width(sheet.subtitle, SUBTITLE_SIZE))
        self.width = max(self.lefts[-1] + last, MARGIN + max(title)) + MARGIN
        self.height = self.tops[-1] + MARGIN - ROW_GAP // 2

    @staticmethod
    def _width(sheet: Sheet, column: int) -> int:
        most = max((min(len(row.cells[column]), PICTURES_A_LINE) for row in sheet.rows), default=1)
        title = round(text_width(sheet.columns[column], HEAD_SIZE))
        return max(max(1, most) * (PICTURE + GAP) - GAP, title)


class _Canvas:
    """A white page in layout units."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)

    def text(self, at: tuple[float, float], text: str, size: int, color: str) -> None:
        self._draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=color, font=load_font(size * SCALE))

    def rule(self, y: int, width: int) -> None:
        self._draw.line([(MARGIN * SCALE, y * SCALE), ((width - MARGIN) * SCALE, y * SCALE)], fill=RULE, width=SCALE)

    def picture(self, at: tuple[int, int], picture: Picture) -> None:
        x, y = at
        image = enlarge(picture.image, PICTURE * SCALE)
        self.image.paste(image, (x * SCALE, y * SCALE))
        edge = [x * SCALE - 1, y * SCALE - 1, x * SCALE + image.width, y * SCALE + image.height]
        self._draw.rectangle(edge, outline=RULE, width=1)
        for number, (line, color) in enumerate(_caption(picture)):
            self.text((x, y + PICTURE + 5 + number * NOTE_LINE), line, NOTE_SIZE, color)


def _places(pictures: Sequence[Picture], left: int, top: int) -> Iterator[tuple[int, int]]:
    """Left to right, then down: a group of more than PICTURES_A_LINE takes several lines."""
    height = _line_height(pictures)
    for number in range(len(pictures)):
        line, place = divmod(number, PICTURES_A_LINE)
        yield left + place * (PICTURE + GAP), top + line * height


def _line_height(pictures: Sequence[Picture]) -> int:
    lines = max((len(_caption(picture)) for picture in pictures), default=0)
    return PICTURE + GAP + lines * NOTE_LINE


def _caption(picture: Picture) -> list[tuple[str, str]]:
    """The lines under a picture with their colours: the first may take two, the others one each."""
    first, rest = picture.lines[:1], picture.lines[1:]
    broken = [line for text in first for line in wrap(text, NOTE_SIZE, PICTURE, lines=2)]
    return [(line, SOFT) for line in broken] + [(shorten(line, NOTE_SIZE, PICTURE), FAINT) for line in rest]


def _group_height(pictures: Sequence[Picture]) -> int:
    return -(-max(1, len(pictures)) // PICTURES_A_LINE) * _line_height(pictures)


def load_font(size: int) -> Font:
    """Pillow's own typeface: the same on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    """In layout units."""
    return load_font(size * SCALE).getlength(text) / SCALE


def shorten(text: str, size: int, width: int) -> str:
    """The text, or as much of its beginning as fits with three dots."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    end = len(text)
    while end and text_width(text[:end].rstrip() + "...", size) > width:
        end -= 1
    return text[:end].rstrip() + "..."


def wrap(text: str, size: int, width: int, *, lines: int) -> list[str]:
    """Break at spaces into at most `lines` lines; what is left over is cut with dots on the last."""
    words, broken = text.split(), list[str]()
    while words and len(broken) < lines - 1:
        count = 1
        while count < len(words) and text_width(" ".join(words[: count + 1]), size) <= width:
            count += 1
        broken.append(shorten(" ".join(words[:count]), size, width))
        words = words[count:]
    return [*broken, shorten(" ".join(words), size, width)] if words else broken


def _scaled(image: Image.Image, factor: float) -> tuple[int, int]:
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


STYLE = """
:root { color-scheme: light; }
body { margin: 36px; background: #fff; color: #1b1f24; font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 4px; }
p.subtitle { color: #57606a; font-size: 13px; margin: 0 0 24px; }
table { border-collapse: collapse; }
th { text-align: left; font-size: 12px; font-weight: 500; color: #6e7781; padding: 0 34px 8px 0; }
td { vertical-align: top; padding: 14px 34px 8px 0; border-top: 1px solid #e3e6ea; }
td.prompt { width: 210px; }
td.prompt small { display: block; color: #6e7781; font-size: 12px; margin-top: 6px; }
.group { display: grid; grid-template-columns: repeat(4, 128px); gap: 10px; width: max-content; }
.group.of1 { grid-template-columns: 128px; } .group.of2 { grid-template-columns: repeat(2, 128px); }
.group.of3 { grid-template-columns: repeat(3, 128px); }
figure { margin: 0; }
img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; outline: 1px solid #e3e6ea; }
figcaption { font-size: 12px; line-height: 1.35; color: #57606a; overflow-wrap: anywhere; }
figcaption span { display: block; } figcaption span + span { color: #6e7781; font-variant-numeric: tabular-nums; }
""".strip()


def render_html(sheet: Sheet) -> str:
    """One file that needs nothing else: pictures are inside, every text is escaped, whole captions are kept."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("Prompt", *sheet.columns))
    rows = "\n".join(_html_row(row) for row in sheet.rows)
    subtitle = f'<p class="subtitle">{html.escape(sheet.subtitle)}</p>' if sheet.subtitle else ""
    title = html.escape(sheet.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style></head>\n<body><h1>{title}</h1>{subtitle}\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></body></html>\n"
    )


def _html_row(row: Row) -> str:
    note = f"<small>{html.escape(row.note)}</small>" if row.note else ""
    cells = "".join(f"<td>{_html_group(group)}</td>" for group in row.cells)
    return f'<tr><td class="prompt">{html.escape(row.prompt)}{note}</td>{cells}</tr>'


def _html_group(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return "-"
    return f'<div class="group of{len(pictures)}">{"".join(_html_picture(picture) for picture in pictures)}</div>'


def _html_picture(picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    lines = [html.escape(line) for line in picture.lines]
    caption = "".join(f"<span>{line}</span>" for line in lines)
    alt = lines[0] if lines else "drawn picture"
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
