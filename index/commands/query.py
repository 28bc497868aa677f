"""`radt index query`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from index.commands.options import JsonOption, KbsOption, ModelOption, open_all_for_query, print_json
from index.errors import QueryError

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.records import Hit
    from index.search.joined import JoinedKnowledgeBase
    from index.search.retriever import SearchResult


def add_query(app: typer.Typer, default_model: str | None) -> None:
    """Register `query`."""

    @app.command()
    def query(
        kbs: KbsOption,
        text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
        k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 5,
        by: Annotated[Literal["hybrid", "clip", "bm25", "tfidf"], typer.Option(help="What to compare by.")] = "hybrid",
        fusion: Annotated[Literal["rrf", "sum", "product"], typer.Option(help="How hybrid joins the two.")] = "rrf",
        image: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="Look for what is like it.")
        ] = None,
        pair: Annotated[int | None, typer.Option("--id", help="Look for what is like this pair.")] = None,
        where: Annotated[str | None, typer.Option(help="An SQL filter: width >= 256.")] = None,
        dataset: Annotated[list[str] | None, typer.Option(help="Only pairs of this dataset, or of these.")] = None,
        min_score: Annotated[float | None, typer.Option(help="Lowest score of a hit.")] = None,
        exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Compare every pair.")] = False,
        why_not: Annotated[int | None, typer.Option(help="Say why this pair is not a hit.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write a contact sheet.")] = None,
        snapshot: Annotated[
            str | None, typer.Option(help="Search the state that a build left: build-2. `stats` lists them.")
        ] = None,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find the best pairs for a text, an image, or a pair."""
        if text is None and image is None and pair is None:
            raise typer.BadParameter("give a TEXT, an --image or an --id to look for")
        base = open_all_for_query(kbs, model, default_model, snapshot=snapshot)
        asked: dict[str, Any] = {"by": by, "fusion": fusion, "where": where, "dataset": dataset, "exact": exact}
        asked.update(k=k, min_score=min_score)
        if image is not None:
            asked["image"] = _open_image(image)
        if pair is not None:
            asked.update(vector=base.show(pair).vector, exclude=[pair])
        result = base.query(text, **asked)
        document = {
            "query": text if text is not None else str(image or pair),
            "kb": kbs[0] if len(kbs) == 1 else kbs,
            "snapshot": base.store.version,
            "timings_ms": {name: round(ms, 3) for name, ms in result.timings_ms.items()},
            "hits": [hit.to_json() for hit in result.hits],
        }
        if why_not is not None:
            from index.search.explain import why_not as explain

            document["why_not"] = explain(base.retriever, why_not, text, **asked)
        if html is not None:
            words = text if by in ("hybrid", "bm25") else None
            title, kb = str(document["query"]), " + ".join(kbs)
            _write_html(html, base, result, kb=kb, title=title, words=words, image=asked.get("image"))
        print_json(document) if as_json else _print_hits(result.hits, document)


def _write_html(
    path: Path,
    base: "KnowledgeBase | JoinedKnowledgeBase",
    result: "SearchResult",
    *,
    kb: str,
    title: str,
    words: str | None,
    image: Any,
) -> None:
    from index.search.explain import write_contact_sheet

    terms = base.retriever.contributions(words, [hit.id for hit in result.hits]) if words else None
    try:
        write_contact_sheet(
            path,
            title,
            result.hits,
            timings_ms=result.timings_ms,
            kb=kb,
            query_image=image,
            terms=terms,
        )
    except OSError as error:
        raise QueryError(f"cannot write {path}: {error.strerror or error}; name another file") from error


def _open_image(path: Path) -> Any:
    from index.embedder import decode_image
    from index.errors import CorpusError

    try:
        return decode_image(path.read_bytes())
    except CorpusError as error:
        raise QueryError(f"cannot search by {path}: {error}") from error


def _print_hits(hits: "Sequence[Hit]", document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("rank", "score", "clip", "bm25", "caption", "dataset", title=escape(document["query"]))
    table.add_column("id", no_wrap=True)
    for hit in hits:
        parts = ["" if score is None else f"{score:.3f}" for score in (hit.clip, hit.bm25)]
        table.add_row(str(hit.rank), f"{hit.score:.4f}", *parts, escape(hit.caption), hit.dataset, str(hit.id))
    console = Console()
    console.print(table if hits else "nothing found")
    if "why_not" in document:
        console.print(document["why_not"])
