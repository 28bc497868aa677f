"""`radt report RESULTS_DIR... --out DIR`: one page of everything that was measured, as HTML and as Markdown.

Reads what benchmarks stored (`radt/evaluation/results.py`), whatever they measured: every table, every plot and every
picture, with the command that made it and its date. The HTML is one file that needs nothing else; beside the Markdown
lie its plots, as SVG, and its pictures.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from index.atomic import new_folder, write_bytes
from index.errors import CorpusError, QueryError
from radt.evaluation.plain_results import find_plain_results
from radt.evaluation.results import Cell, Estimate, Picture, Result, Table, find_results, now
from radt.evaluation.svg_plot import draw_plot
from radt.evaluation.tables import cell_text, escape_markdown, markdown_table

TITLE = "What was measured"
FILES = "report.files"  # the folder of what the Markdown shows
OWN_FILE = re.compile(r".+-\d+\.svg|.+-picture-\d+\.(png|jpe?g)")
MIMES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
STYLE = """
:root { color-scheme: light; }
body { margin: 36px auto; max-width: 1100px; padding: 0 24px; background: #fff; color: #1b1f24;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; font-weight: 600; margin: 0 0 4px; }
h2 { font-size: 19px; font-weight: 600; margin: 44px 0 4px; padding-top: 18px; border-top: 1px solid #e3e6ea; }
h3 { font-size: 15px; font-weight: 600; margin: 22px 0 6px; }
p.facts { color: #57606a; font-size: 13px; margin: 2px 0; }
pre { background: #f6f8fa; padding: 8px 12px; font-size: 13px; overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: right; font-size: 12px; font-weight: 500; color: #6e7781; padding: 0 0 6px 28px; }
td { text-align: right; padding: 5px 0 5px 28px; border-top: 1px solid #e3e6ea; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { color: #6e7781; font-size: 12px; }
img, svg { max-width: 100%; height: auto; }
ul.contents { padding-left: 18px; }
a { color: #0b61a4; text-decoration: none; }
""".strip()


def write_report(folders: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into `out`, and what the Markdown shows into `out/report.files/`.

    Everything is read and drawn before anything is written. Returns (html, md). A CorpusError where the folders hold no
    result, or a picture of one is gone; a QueryError where `out/report.files` holds what no report wrote.
    """
    stored = [*find_results(folders), *find_plain_results(folders)]
    found = sorted(stored, key=lambda each: (each[1].kind, each[1].date))
    if not found:
        below = ", ".join(str(folder) for folder in folders)
        raise CorpusError(f"there is no stored result below {below}: `radt evaluate ... --out DIR` writes one")
    if out.is_file():
        raise QueryError(f"--out {str(out)!r} is a file; name a folder for report.html and report.md")
    names = name_results([result for _, result in found])
    files = _files_beside(found, names)
    html_page, markdown = render_html(found, names), render_markdown([result for _, result in found], names)
    _check_ours(out / FILES)
    with new_folder(out / FILES) as beside:
        for name, content in files.items():
            (beside / name).write_bytes(content)
    page, text = out / "report.html", out / "report.md"
    write_bytes(page, html_page.encode())
    write_bytes(text, markdown.encode())
    return page, text


def _files_beside(found: Sequence[tuple[Path, Result]], names: Sequence[str]) -> dict[str, bytes]:
    """The plots and pictures that the Markdown shows, by file name."""
    files: dict[str, bytes] = {}
    for (folder, result), name in zip(found, names, strict=True):
        for number, plot in enumerate(result.plots, 1):
            files[f"{name}-{number}.svg"] = (draw_plot(plot) + "\n").encode()
        for number, picture in enumerate(result.pictures, 1):
            files[picture_name(name, number, picture)] = _read_picture(folder / picture.file)
    return files


def _read_picture(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} is gone, and a result shows it: measure that again") from error


def _check_ours(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but plots and pictures of an earlier report."""
    if not folder.exists() and not folder.is_symlink():
        return
    is_folder = folder.is_dir() and not folder.is_symlink()
    others = [path for path in folder.iterdir() if not _is_ours(path)] if is_folder else [folder]
    if others:
        raise QueryError(
            f"{min(others)} was not written by `radt report`, which would replace it: choose another --out"
        )


def _is_ours(path: Path) -> bool:
    return path.is_file() and OWN_FILE.fullmatch(path.name) is not None


def name_results(results: Sequence[Result]) -> list[str]:
    """A short name for each, of its kind, no two alike."""
    names: list[str] = []
    for result in results:
        taken = sum(name.partition(".")[0] == result.kind for name in names)
        names.append(result.kind if not taken else f"{result.kind}.{taken + 1}")
    return names


def picture_name(name: str, number: int, picture: Picture) -> str:
    """What a picture's copy beside the Markdown is called."""
    return f"{name}-picture-{number}{Path(picture.file).suffix.lower()}"


# Markdown


def render_markdown(results: Sequence[Result], names: Sequence[str]) -> str:
    """The page for a repository."""
    parts = [f"# {TITLE}", f"{len(results)} results, put together {now()}."]
    for result, name in zip(results, names, strict=True):
        parts += [f"## {escape_markdown(result.title)}", _facts_line(result), f"```\n{result.command}\n```"]
        parts += [escape_markdown(result.note)] if result.note else []
        for table in result.tables:
            parts += [f"### {escape_markdown(table.title)}", markdown_table(table)]
            parts += [escape_markdown(table.note)] if table.note else []
        for number, plot in enumerate(result.plots, 1):
            parts += [
                f"### {escape_markdown(plot.title)}",
                f"![{escape_markdown(plot.title)}]({FILES}/{name}-{number}.svg)",
            ]
            parts += [escape_markdown(plot.note)] if plot.note else []
        for number, picture in enumerate(result.pictures, 1):
            file = picture_name(name, number, picture)
            title = escape_markdown(picture.title)
            parts += [f"### {title}", f"![{title}]({FILES}/{file})"]
    return "\n\n".join(parts) + "\n"


def _facts_line(result: Result) -> str:
    return escape_markdown("; ".join([result.date, *(f"{name} {text}" for name, text in _plain_facts(result))]))


def _plain_facts(result: Result) -> list[tuple[str, str]]:
    """The facts that a line can say."""
    return [(name, cell_text(value)) for name, value in result.facts.items() if isinstance(value, str | int | float)]


# HTML


def render_html(found: Sequence[tuple[Path, Result]], names: Sequence[str]) -> str:
    """The page as one file: pictures are inside, every text is escaped."""
    contents = "".join(
        f'<li><a href="#{html.escape(name)}">{html.escape(result.title)}</a></li>'
        for (_, result), name in zip(found, names, strict=True)
    )
    shown = [_html_result(folder, result, name) for (folder, result), name in zip(found, names, strict=True)]
    sections = "\n".join(shown)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>\n'
        f"<style>\n{STYLE}\n</style></head>\n<body><h1>{TITLE}</h1>\n"
        f'<p class="facts">{len(found)} results, put together {now()}</p>\n<ul class="contents">{contents}</ul>\n'
        f"{sections}\n</body></html>\n"
    )


def _html_result(folder: Path, result: Result, name: str) -> str:
    parts = [
        f'<h2 id="{html.escape(name)}">{html.escape(result.title)}</h2>',
        f'<p class="facts">{_facts_html(result)}</p>',
        f"<pre>{html.escape(result.command)}</pre>",
        *([f"<p>{html.escape(result.note)}</p>"] if result.note else []),
    ]
    for table in result.tables:
        parts += [f"<h3>{html.escape(table.title)}</h3>", _html_table(table), _note(table.note)]
    for plot in result.plots:
        parts += [f"<h3>{html.escape(plot.title)}</h3>", draw_plot(plot), _note(plot.note)]
    for picture in result.pictures:
        title = html.escape(picture.title)
        parts += [f"<h3>{title}</h3>", f'<img alt="{title}" src="{_data_uri(folder / picture.file)}">']
    return "\n".join(part for part in parts if part)


def _facts_html(result: Result) -> str:
    told = [f"{html.escape(name)} <b>{html.escape(text)}</b>" for name, text in _plain_facts(result)]
    return " &middot; ".join([html.escape(result.date), *told])


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _html_cell(cell: Cell) -> str:
    text = cell_text(cell)
    if isinstance(cell, Estimate):
        value, _, interval = text.partition(" ")
        return f"{value} <small>{interval}</small>"
    return html.escape(text)


def _note(text: str) -> str:
    return f'<p class="facts">{html.escape(text)}</p>' if text else ""


def _data_uri(path: Path) -> str:
    mime = MIMES.get(path.suffix.lower())
    if mime is None:
        raise CorpusError(f"{path} is no PNG or JPEG, and a result shows it: store its pictures as one of these")
    return f"data:{mime};base64,{base64.b64encode(_read_picture(path)).decode('ascii')}"
