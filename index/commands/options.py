"""What the `radt index` commands share: options that mean the same everywhere, opening, and printing."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase

KbOption = Annotated[Path, typer.Option("--kb", help="Folder of the knowledge base.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="An open_clip name (NAME or NAME/WEIGHTS), or a model folder or bundle.")
]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, metavar="SECONDS", help="How long to wait while another process writes.")
]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Name of the dataset.")]


def names(model: str | None) -> list[str]:
    """The models to try after the one that a knowledge base was made with."""
    return [model] if model else []


def open_for_query(kb: Path, model: str | None, default_model: str | None) -> "KnowledgeBase":
    """Open it with the model it was made with, or with the one that is asked for."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase

    if model is None:
        return KnowledgeBase.open(kb, models=names(default_model))
    return KnowledgeBase.open(kb, ClipEmbedder.load(model))


def say(sentence: str) -> None:
    """A word on stderr, for people: stdout belongs to the answer."""
    print(sentence, file=sys.stderr, flush=True)


def plain(value: Any) -> str:
    """A value as a cell of a table."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A table of names and values."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, escape(value))
    Console().print(table)


def print_json(document: dict[str, Any]) -> None:
    """The one document of `--json`."""
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))
