"""`radt index add`, `remove` and `compact`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from index.commands.options import (
    DatasetOption,
    JsonOption,
    KbOption,
    WaitOption,
    check_datasets,
    names,
    print_json,
    print_table,
    read_lines,
    say,
)
from index.errors import QueryError
from index.filters import PAIR_FIELDS, listed_datasets

if TYPE_CHECKING:
    from index.compaction import CompactReport
    from index.ingest.build import BuildReport
    from index.knowledge_base import KnowledgeBase


def add_changes(app: typer.Typer, default_model: str | None) -> None:
    """Register `add`, `remove` and `compact`."""

    @app.command()
    def add(
        source: Annotated[str, typer.Argument(help="An image, a folder of images, or a source of pairs.")],
        kb: KbOption,
        caption: Annotated[
            str | None, typer.Option(help="What the image shows, or all images of the folder do.")
        ] = None,
        dataset: DatasetOption = None,
        wait: WaitOption = 0,
        as_json: JsonOption = False,
    ) -> None:
        """Add an image with its caption, or a source of pairs that have theirs; they are found by the next query."""
        from index.knowledge_base import ADDED, KnowledgeBase

        base = KnowledgeBase.open(kb, models=names(default_model))
        report: BuildReport | None = None
        with base.store.lock(wait, on_wait=say):
            if caption is not None:
                ids = base.add(_images_of(source), caption, dataset=dataset or ADDED)
            else:
                ids, report = _add_source(base, source, dataset)
        document: dict[str, Any] = {"kb": str(kb), "ids": [str(i) for i in ids], "layouts": {}, "notes": []}
        if report is not None:
            document |= {"layouts": report.layouts, "notes": report.notes, "quarantined": report.quarantined}
        if as_json:
            print_json({**document, "snapshot": base.store.version})
        else:
            _print_added(document)

    @app.command()
    def remove(
        kb: KbOption,
        ids: Annotated[list[int] | None, typer.Option("--id", help="A pair to take down; may be repeated.")] = None,
        where: Annotated[
            str | None,
            typer.Option(
                help="An SQL filter, such as caption LIKE '%dog%' or metadata LIKE '%example.org%'; the fields are "
                f"{', '.join(PAIR_FIELDS)}."
            ),
        ] = None,
        dataset: Annotated[
            str | None, typer.Option(help="A whole dataset, or with --where what the filter leaves of it.")
        ] = None,
        ids_file: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="A file of ids, one a line.")
        ] = None,
        same_image: Annotated[
            bool, typer.Option("--same-image", help="Take down all that show the same image or lie at its address.")
        ] = False,
        wait: WaitOption = 0,
        as_json: JsonOption = False,
    ) -> None:
        """Take pairs down. The next query obeys, and no later build brings them back; `compact` purges their bytes."""
        from index.knowledge_base import KnowledgeBase

        is_filter = where is not None or dataset is not None
        if is_filter == (ids is not None or ids_file is not None):
            raise typer.BadParameter("give either --id or --ids-file, or --where or --dataset")
        wanted = [*(ids or []), *(_read_ids(ids_file) if ids_file else [])]
        base = KnowledgeBase.open(kb, models=names(default_model))
        with base.store.lock(wait, on_wait=say):
            chosen = _filter(base, where, dataset)
            gone = base.remove(None if is_filter else wanted, where=chosen, same_image=same_image)
        document = _removal(base, gone, wanted, is_filter=is_filter)
        print_json(document) if as_json else _print_removal(document)

    @app.command()
    def compact(
        kb: KbOption,
        keep: Annotated[
            int | None,
            typer.Option(
                min=0, help="Newest snapshots to keep; all if not given. Those with removed pairs go in any case."
            ),
        ] = None,
        wait: WaitOption = 0,
        as_json: JsonOption = False,
    ) -> None:
        """Merge small files, fold new rows into the searcher, purge what was removed, delete what nothing needs."""
        from index.compaction import compact as compact_knowledge_base
        from index.knowledge_base import KnowledgeBase

        base = KnowledgeBase.open(kb, models=names(default_model))
        report = compact_knowledge_base(base, keep=keep, wait=wait, on_wait=say)
        print_json(report.to_json()) if as_json else _print_compaction(report)


def _print_added(document: dict[str, Any]) -> None:
    """The ids, and on stderr what else a person wants to know."""
    for layout, count in document["layouts"].items():
        say(f"{layout}: {count} shard" + "s" * (count > 1))
    for note in document["notes"]:
        say(f"note: {note}")
    kb = shlex.quote(document["kb"])
    if document.get("quarantined"):
        say(f"{document['quarantined']:,} samples are in quarantine; why: radt index stats --quarantine --kb {kb}")
    if not document["ids"]:
        say("nothing is new: all of it is there already")
    for pair in document["ids"]:
        print(pair)


def _filter(base: "KnowledgeBase", where: str | None, dataset: str | None) -> str | None:
    """One filter of both. QueryError, with those there are, for a dataset that is not there."""
    from index.search.request import condition

    check_datasets(base, None if dataset is None else [dataset])
    return where if dataset is None else condition(where, dataset)


def _removal(base: "KnowledgeBase", gone: Sequence[int], wanted: Sequence[int], *, is_filter: bool) -> dict[str, Any]:
    is_in_vain = is_filter and not gone
    return {
        "kb": base.name,
        "removed": len(gone),
        "ids": [str(i) for i in gone],
        "notes": [f"the filter matches no pair, and {listed_datasets(base.store.datasets())}"] if is_in_vain else [],
        "missing": [str(i) for i in sorted(set(wanted) - set(gone))],
        "snapshot": base.store.version,
    }


def _print_removal(document: dict[str, Any]) -> None:
    missing = f"; {len(document['missing']):,} were not there" if document["missing"] else ""
    print(f"removed {document['removed']:,}{missing}")
    for note in document["notes"]:
        say(f"note: {note}")
    if document["removed"]:
        say(f"to purge their bytes: radt index compact --kb {shlex.quote(document['kb'])}")


def _print_compaction(report: "CompactReport") -> None:
    from index.search.sizes import gigabytes

    rows = {
        "pairs": f"{report.pairs:,}",
        "size": f"{gigabytes(report.bytes_before)} before, {gigabytes(report.bytes_after)} after",
        "fragments": f"{report.fragments_before} before, {report.fragments_after} after",
        "versions deleted": str(report.versions_removed),
        "snapshots": ", ".join(report.snapshots) or "none",
        "searcher": f"{report.searcher}, recall@10 {report.recall_at_10:.3f}",
    }
    if report.snapshots_dropped:
        rows["snapshots dropped"] = ", ".join(report.snapshots_dropped)
    if report.snapshots_dropped_for_removed:
        rows["dropped with removed pairs"] = ", ".join(report.snapshots_dropped_for_removed)
    print_table(report.kb, list(rows.items()))


def _images_of(source: str) -> list[str]:
    """An image is itself; a folder is every image in it."""
    from index.ingest.readers import IMAGE_SUFFIXES

    if not Path(source).is_dir():
        return [source]
    found = sorted(str(p) for p in Path(source).iterdir() if p.suffix[1:].lower() in IMAGE_SUFFIXES)
    if not found:
        raise QueryError(f"there is no image in {source!r}; give an image, or a folder of images")
    return found


def _add_source(base: "KnowledgeBase", source: str, dataset: str | None) -> "tuple[list[int], BuildReport]":
    """The new ids, and what a build of the source has to tell."""
    import numpy as np

    from index.ingest.build import BuildConfig, build
    from index.ingest.readers import IMAGE_SUFFIXES

    if Path(source).suffix[1:].lower() in IMAGE_SUFFIXES:
        raise typer.BadParameter("an image needs a --caption")
    base.refresh()
    before = base.store.matching_ids()
    report = build(base, [source], BuildConfig(dataset=dataset, searcher=base.searcher_choice()))
    return [int(i) for i in np.setdiff1d(base.store.matching_ids(), before)], report


def _read_ids(path: Path) -> list[int]:
    words = " ".join(read_lines(path, of="id")).split()
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise QueryError(f"{path} has {word!r} where an id should be; put one id on each line")
    return [int(word) for word in words]
