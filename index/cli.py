"""The commands of `radt index`. Each parses, makes one library call and prints; heavy imports wait until then."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from index.errors import ModelError, QueryError, UserError

if TYPE_CHECKING:
    from index.ingest.build import BuildReport
    from index.knowledge_base import KnowledgeBase
    from index.records import Hit, ShardRecord, StoredPair
    from index.search.retriever import SearchResult

KbOption = Annotated[Path, typer.Option("--kb", help="Folder of the knowledge base.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="An open_clip name (NAME or NAME/WEIGHTS), or a model folder or bundle.")
]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Name of the dataset.")]


def make_app(default_model: str | None = None) -> typer.Typer:
    """The `index` commands. `default_model` is what `--model` means when it is not given; `index` has none itself."""
    app = typer.Typer(
        help="Build a knowledge base of image-text pairs, search it, change it.",
        epilog="Add --debug to any command to see where an error comes from.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    _add_build(app, default_model)
    _add_changes(app, default_model)
    _add_query(app, default_model)
    _add_views(app)
    return app


def run(app: Callable[..., Any], args: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0 done, 1 failed with one sentence on stderr, 2 wrong usage, 130 interrupted.

    `--debug`, anywhere, lets the traceback through.
    """
    words = list(sys.argv[1:] if args is None else args)
    is_debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"])
    except UserError as error:
        if is_debug:
            raise
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail(_STOPPED, 130)
    except SystemExit as exit_:
        if exit_.code == 130:
            _fail(_STOPPED, 130)
        raise
    sys.exit(0)


_STOPPED = "stopped; what was finished is kept, and the same command goes on from there"


def _fail(sentence: str, code: int) -> NoReturn:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)


# build


def _add_build(app: typer.Typer, default_model: str | None) -> None:
    @app.command()
    def build(
        sources: Annotated[list[str], typer.Argument(help="Tars, or folders of tars or of captioned images.")],
        kb: KbOption,
        model: ModelOption = None,
        dataset: DatasetOption = None,
        searcher: Annotated[
            Literal["auto", "exact", "scann", "lance"],
            typer.Option(help="auto: exact when small, else ScaNN or Lance."),
        ] = "auto",
        engine: Annotated[Literal["local"], typer.Option(help="Who runs the shards.")] = "local",
        workers: Annotated[
            int | None, typer.Option(min=1, help="Decoding threads; one a processor if not given.")
        ] = None,
        allow_partial: Annotated[
            bool, typer.Option("--allow-partial/--no-allow-partial", help="Take shards that are not complete.")
        ] = False,
        max_bad_fraction: Annotated[
            float, typer.Option(min=0.0, max=1.0, help="Share of bad samples above which the build fails.")
        ] = 0.1,
        seed: Annotated[int, typer.Option(help="Seed of the searcher's training.")] = 0,
        as_json: JsonOption = False,
    ) -> None:
        """Bring pairs in: exactly once, whatever interrupts it. Run it again to go on, or to take in what changed."""
        from index.ingest.build import BuildConfig, check_sources
        from index.ingest.build import build as build_knowledge_base

        config = BuildConfig(
            dataset=dataset,
            searcher=searcher,
            allow_partial=allow_partial,
            max_bad_fraction=max_bad_fraction,
            workers=workers,
            seed=seed,
        )
        check_sources(sources, kb)  # before a model is loaded
        base = _open_or_create(kb, model, default_model)
        with _progress(as_json) as hooks:
            report = build_knowledge_base(base, sources, config, **hooks)
        _print_json(report.to_json()) if as_json else _print_report(report)


def _open_or_create(kb: Path, model: str | None, default_model: str | None) -> "KnowledgeBase":
    """A knowledge base keeps the model it was made with; one that is asked for by name must be that one."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import MANIFEST, KnowledgeBase

    if model is None and (kb / MANIFEST).exists():
        return KnowledgeBase.open(kb, models=_names(default_model))
    name = model or default_model
    if name is None:
        raise ModelError(f"say which model is to make the vectors of {kb}: --model ViT-B-32, or a model's folder")
    return KnowledgeBase.create(kb, ClipEmbedder.load(name))


@contextmanager
def _progress(is_silent: bool) -> Iterator[dict[str, Callable[[Any], None]]]:
    """A line on stderr while it runs, on a terminal only: what to call with each batch and each shard."""
    if is_silent or not sys.stderr.isatty():
        yield {}
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.completed:.0f} images, {task.fields[shards]} shards stored")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("build", total=None, shards=0)
        stored: list[ShardRecord] = []

        def on_batch(images: int) -> None:
            progress.update(task, advance=images)

        def on_shard(record: "ShardRecord") -> None:
            stored.append(record)
            progress.update(task, shards=len(stored))

        yield {"on_batch": on_batch, "on_shard": on_shard}


def _print_report(report: "BuildReport") -> None:
    rows = {
        "pairs": f"{report.pairs_total} ({report.pairs_added} added, {report.pairs_per_second:.0f}/s)",
        "quarantined": str(report.quarantined),
        "shards": f"{report.shards_done} read, {report.shards_unchanged} unchanged, {report.shards_skipped} skipped",
        "searcher": f"{report.searcher}, recall@10 {report.recall_at_10:.3f}",
        "size": f"{report.bytes / 1e6:.1f} MB",
        "seconds": f"{report.seconds:.1f}",
    }
    _print_table(report.kb, list(rows.items()))
    for shard in report.skipped:
        print(f"skipped {shard.name}: {shard.reason}", file=sys.stderr)


# add, remove


def _add_changes(app: typer.Typer, default_model: str | None) -> None:
    @app.command()
    def add(
        source: Annotated[str, typer.Argument(help="An image, a folder of images, or a source of pairs.")],
        kb: KbOption,
        caption: Annotated[
            str | None, typer.Option(help="What the image shows, or all images of the folder do.")
        ] = None,
        dataset: DatasetOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Add an image with its caption, or a source of pairs that have theirs; they are found by the next query."""
        from index.knowledge_base import ADDED, KnowledgeBase

        base = KnowledgeBase.open(kb, models=_names(default_model))
        if caption is not None:
            ids = base.add(_images_of(source), caption, dataset=dataset or ADDED)
        else:
            ids = _add_source(base, source, dataset)
        texts = [str(i) for i in ids]
        _print_json({"kb": str(kb), "ids": texts, "snapshot": base.store.version}) if as_json else print(
            "\n".join(texts)
        )

    @app.command()
    def remove(
        kb: KbOption,
        ids: Annotated[list[int] | None, typer.Option("--id", help="A pair to take down; may be repeated.")] = None,
        where: Annotated[str | None, typer.Option(help="An SQL filter: dataset = 'pets'.")] = None,
        ids_file: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="A file of ids, one a line.")
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        """Take pairs down. The next query obeys, and no later build brings them back."""
        from index.knowledge_base import KnowledgeBase

        wanted = [*(ids or []), *(_read_ids(ids_file) if ids_file else [])]
        if (where is None) == (ids is None and ids_file is None):
            raise typer.BadParameter("give either --id or --ids-file, or --where")
        base = KnowledgeBase.open(kb, models=_names(default_model))
        gone = base.remove(where=where) if where is not None else base.remove(wanted)
        missing = sorted(set(wanted) - set(gone))
        if as_json:
            document = {"kb": str(kb), "removed": len(gone), "ids": [str(i) for i in gone]}
            _print_json({**document, "missing": [str(i) for i in missing], "snapshot": base.store.version})
        else:
            print(f"removed {len(gone)}" + (f"; {len(missing)} were not there" if missing else ""))


def _names(model: str | None) -> list[str]:
    return [model] if model else []


def _images_of(source: str) -> list[str]:
    """An image is itself; a folder is every image in it."""
    from index.ingest.readers import IMAGE_SUFFIXES

    if not Path(source).is_dir():
        return [source]
    found = sorted(str(p) for p in Path(source).iterdir() if p.suffix[1:].lower() in IMAGE_SUFFIXES)
    if not found:
        raise QueryError(f"there is no image in {source!r}; give an image, or a folder of images")
    return found


def _add_source(base: "KnowledgeBase", source: str, dataset: str | None) -> list[int]:
    import numpy as np

    from index.ingest.build import BuildConfig, build
    from index.ingest.readers import IMAGE_SUFFIXES

    if Path(source).suffix[1:].lower() in IMAGE_SUFFIXES:
        raise typer.BadParameter("an image needs a --caption")
    before = base.store.matching_ids()
    build(base, [source], BuildConfig(dataset=dataset))
    return [int(i) for i in np.setdiff1d(base.store.matching_ids(), before)]


def _read_ids(path: Path) -> list[int]:
    words = path.read_text(encoding="utf-8").split()
    for word in words:
        if not word.isdigit():
            raise QueryError(f"{path} has {word!r} where an id should be; put one id on each line")
    return [int(word) for word in words]


# query


def _add_query(app: typer.Typer, default_model: str | None) -> None:
    @app.command()
    def query(
        kb: KbOption,
        text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
        k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 5,
        by: Annotated[Literal["hybrid", "clip", "bm25", "tfidf"], typer.Option(help="What to compare by.")] = "hybrid",
        fusion: Annotated[Literal["rrf", "sum", "product"], typer.Option(help="How hybrid joins the two.")] = "rrf",
        image: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="Look for what is like it.")
        ] = None,
        pair: Annotated[int | None, typer.Option("--id", help="Look for what is like this pair.")] = None,
        where: Annotated[str | None, typer.Option(help="An SQL filter: width >= 256.")] = None,
        dataset: Annotated[str | None, typer.Option(help="Only pairs of this dataset.")] = None,
        min_score: Annotated[float | None, typer.Option(help="Lowest score of a hit.")] = None,
        exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Compare every pair.")] = False,
        why_not: Annotated[int | None, typer.Option(help="Say why this pair is not a hit.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write a contact sheet.")] = None,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find the best pairs for a text, an image, or a pair."""
        if text is None and image is None and pair is None:
            raise typer.BadParameter("give a TEXT, an --image or an --id to look for")
        base = _open_for_query(kb, model, default_model)
        asked: dict[str, Any] = {"by": by, "fusion": fusion, "where": where, "dataset": dataset, "exact": exact}
        asked.update(k=k, min_score=min_score)
        if image is not None:
            asked["image"] = _open_image(image)
        if pair is not None:
            asked.update(vector=base.show(pair).vector, exclude=[pair])
        result = base.query(text, **asked)
        document = {
            "query": text if text is not None else str(image or pair),
            "kb": str(kb),
            "snapshot": base.store.version,
            "timings_ms": {name: round(ms, 3) for name, ms in result.timings_ms.items()},
            "hits": [hit.to_json() for hit in result.hits],
        }
        if why_not is not None:
            from index.search.explain import why_not as explain

            document["why_not"] = explain(base.retriever, why_not, text, **asked)
        if html is not None:
            words = text if by in ("hybrid", "bm25") else None
            _write_html(html, base, result, title=str(document["query"]), words=words, image=asked.get("image"))
        _print_json(document) if as_json else _print_hits(result.hits, document)


def _write_html(
    path: Path, base: "KnowledgeBase", result: "SearchResult", *, title: str, words: str | None, image: Any
) -> None:
    from index.search.explain import write_contact_sheet

    terms = base.retriever.contributions(words, [hit.id for hit in result.hits]) if words else None
    try:
        write_contact_sheet(
            path,
            title,
            result.hits,
            timings_ms=result.timings_ms,
            kb=str(base.directory),
            query_image=image,
            terms=terms,
        )
    except OSError as error:
        raise QueryError(f"cannot write {path}: {error.strerror or error}; name another file") from error


def _open_for_query(kb: Path, model: str | None, default_model: str | None) -> "KnowledgeBase":
    from index.embedder import ClipEmbedder
    from index.knowledge_base import KnowledgeBase

    if model is None:
        return KnowledgeBase.open(kb, models=_names(default_model))
    return KnowledgeBase.open(kb, ClipEmbedder.load(model))


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


# show, stats


def _add_views(app: typer.Typer) -> None:
    @app.command()
    def show(
        pair: Annotated[int, typer.Argument(metavar="ID", help="Id of a pair.")],
        kb: KbOption,
        as_json: JsonOption = False,
    ) -> None:
        """Everything that is known of one pair."""
        from index.knowledge_base import KnowledgeBase

        document = _pair_json(KnowledgeBase.open(kb).show(pair))
        _print_json(document) if as_json else _print_table(str(pair), [(k, _plain(v)) for k, v in document.items()])

    @app.command()
    def stats(kb: KbOption, as_json: JsonOption = False) -> None:
        """Sizes, datasets, model and searcher."""
        from index.knowledge_base import KnowledgeBase

        document = KnowledgeBase.open(kb).stats()
        _print_json(document) if as_json else _print_table(str(kb), [(k, _plain(v)) for k, v in document.items()])


def _pair_json(pair: "StoredPair") -> dict[str, Any]:
    return {
        "id": str(pair.id),
        "caption": pair.caption,
        "dataset": pair.dataset,
        "source": pair.source,
        "shard": pair.shard,
        "key": pair.key,
        "image": pair.image.to_json(),
        "sha256": pair.sha256,
        "width": pair.width,
        "height": pair.height,
        "metadata": dict(pair.metadata),
    }


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, escape(value))
    Console().print(table)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))
