"""What the `radt index` commands share: options that mean the same everywhere, opening, and printing."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from index.errors import ConfigError
from index.text import escaped_json, printable

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

KbOption = Annotated[Path, typer.Option("--kb", help="Folder of the knowledge base.")]
KbsOption = Annotated[
    list[str], typer.Option("--kb", help="Folder or URL of a knowledge base; several are searched as if they were one.")
]


def usage_of(parse: Callable[[str], Any]) -> Callable[[str | None], str | None]:
    """A callback for an option: a value that `parse` refuses is wrong usage, and not a failure on the way."""

    def check(value: str | None) -> str | None:
        try:
            if value is not None:
                parse(value)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return check


def _parse_ram(text: str) -> int:
    from index.search.sizes import parse_bytes

    return parse_bytes(text)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="An open_clip name (NAME or NAME/WEIGHTS), or a model folder or bundle.")
]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, metavar="SECONDS", help="How long to wait while another process writes.")
]
RamOption = Annotated[
    str | None,
    typer.Option(
        "--ram",
        metavar="SIZE",
        callback=usage_of(_parse_ram),
        help="Memory a searcher may take: 16G, 800M; else most of it.",
    ),
]
RecallOption = Annotated[
    float | None,
    typer.Option("--recall", min=0.01, max=1.0, help="Share of the true ten a searcher is to find; 0.95 if not given."),
]
DatasetOption = Annotated[
    str | None, typer.Option("--dataset", help="Name of their dataset; if not given, that of the source's folder.")
]


def names(model: str | None) -> list[str]:
    """The models to try after the one that a knowledge base was made with."""
    return [model] if model else []


def open_for_query(kb: str | Path, model: str | None, default_model: str | None) -> "KnowledgeBase":
    """Open it with the model it was made with, or with the one that is asked for."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase

    if model is None:
        return KnowledgeBase.open(kb, models=names(default_model))
    return KnowledgeBase.open(kb, ClipEmbedder.load(model))


def open_all_for_query(
    kbs: Sequence[str], model: str | None, default_model: str | None, *, snapshot: str | None = None
) -> "KnowledgeBase | JoinedKnowledgeBase":
    """Open one as `open_for_query` does, or several as one; as they are, or as a build has left them."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

    embedder = None if model is None else ClipEmbedder.load(model)
    parts = [KnowledgeBase.open(kb, embedder, models=names(default_model), snapshot=snapshot) for kb in kbs]
    return parts[0] if len(parts) == 1 else JoinedKnowledgeBase(parts)


def finite(value: float | None) -> float | None:
    """A callback for an option: nan and inf are wrong usage."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"give a finite number, not {value}")
    return value


def check_datasets(base: "KnowledgeBase | JoinedKnowledgeBase", datasets: Sequence[str] | None) -> None:
    """QueryError, which names those there are, for a dataset that nothing is in: a slip, and not an empty answer."""
    from index.errors import QueryError
    from index.filters import unknown_datasets

    sentence = unknown_datasets(datasets, base.store.datasets()) if datasets else None
    if sentence is not None:
        raise QueryError(sentence)


@contextmanager
def queries_progress(is_silent: bool, *, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr while it runs, on a terminal only: what to call with each query.

    What is printed meanwhile stays on stdout, which must not be the same terminal then.
    """
    if is_silent or not sys.stderr.isatty():
        yield lambda query: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("queries", total=total)
        yield lambda query: progress.update(task, advance=1)


def say(sentence: str) -> None:
    """A word on stderr, for people: stdout belongs to the answer."""
    print(printable(sentence), file=sys.stderr, flush=True)


def read_lines(path: Path, *, of: str = "query") -> list[str]:
    """The lines of a file that say something."""
    from index.errors import QueryError

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{path} cannot be read ({error}); it should be text in UTF-8") from error
    said = [line.strip() for line in lines if line.strip()]
    if not said:
        raise QueryError(f"{path} is empty; write one {of} on each line")
    return said


def escape(text: str) -> str:
    """What others wrote, for rich to print: neither its markup nor what a terminal would obey."""
    import rich.markup

    return rich.markup.escape(printable(text))


def plain(value: Any) -> str:
    """A value as a cell of a table."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A table of names and values."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escape(title), show_header=False)
    for name, value in rows:
        table.add_row(name, escape(value))
    Console().print(table)


def print_columns(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a heading for each column."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=escape(title))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def print_json(document: dict[str, Any]) -> None:
    """The one document of `--json`."""
    print(_json(document))


def print_json_as_it_comes(
    head: Mapping[str, Any], name: str, documents: Iterable[Mapping[str, Any]], last: Callable[[], Mapping[str, Any]]
) -> None:
    """`print_json` of head, a list and what comes last, each of the list written when it is there.

    Nothing is written before the first: what is wrong with the question is told in an error alone.
    """
    for place, document in enumerate(documents):
        start = f"{_opened(head)}{json.dumps(name)}: [" if place == 0 else ", "
        print(start + _json(document), end="", flush=True)
    rest = _json(last())
    print("]}" if rest == "{}" else f"], {rest[1:]}")


def _json(document: Mapping[str, Any]) -> str:
    return escaped_json(json.dumps(document, ensure_ascii=False, allow_nan=False))


def _opened(document: Mapping[str, Any]) -> str:
    """A JSON object that goes on."""
    text = _json(document)
    return text[:-1] + ", " * (text != "{}")
