"""`radt index show` and `stats`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from index.commands.options import JsonOption, KbOption, plain, print_columns, print_json, print_table
from index.records import shard_title

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.records import StoredPair


def add_views(app: typer.Typer) -> None:
    """Register `show` and `stats`."""

    @app.command()
    def show(
        pair: Annotated[int, typer.Argument(metavar="ID", help="Id of a pair.")],
        kb: KbOption,
        as_json: JsonOption = False,
    ) -> None:
        """Everything that is known of one pair."""
        from index.knowledge_base import KnowledgeBase

        document = _pair_json(KnowledgeBase.open(kb).show(pair))
        if as_json:
            print_json(document)
        else:
            told = {**document, "shard": shard_title(document["shard"])}
            print_table(str(pair), [(name, plain(value)) for name, value in told.items()])

    @app.command()
    def stats(
        kb: KbOption,
        quarantine: Annotated[
            bool, typer.Option("--quarantine", help="List the samples that could not be used, and why.")
        ] = False,
        words: Annotated[
            bool, typer.Option("--words", help="Read all captions: words that most have, captions that say nothing.")
        ] = False,
        where: Annotated[
            str | None,
            typer.Option(help="With --quarantine, an SQL filter over dataset, shard, key, image_offset and reason."),
        ] = None,
        limit: Annotated[
            int | None, typer.Option(min=0, help="With --quarantine, so many samples at most; 100 if not given.")
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        """What is there, what was left out or taken out, what lags behind, earlier snapshots, and bytes."""
        from index.knowledge_base import KnowledgeBase

        if not quarantine and (where is not None or limit is not None):
            raise typer.BadParameter(f"{'--limit' if where is None else '--where'} goes with --quarantine")
        if quarantine and words:
            raise typer.BadParameter("--words is about the captions of pairs, which --quarantine does not show")
        base = KnowledgeBase.open(kb)
        document = _quarantine_json(base, where, 100 if limit is None else limit) if quarantine else base.stats()
        if words:
            from index.search.words import report_captions

            document["words"] = asdict(report_captions(base.store.captions()[1]))
        if as_json:
            print_json(document)
        elif quarantine:
            _print_quarantine(document, where)
        else:
            _print_stats(document)


def _quarantine_json(base: "KnowledgeBase", where: str | None, limit: int) -> dict[str, Any]:
    samples = base.quarantine(where, limit=limit)
    reasons = base.store.reasons(where)
    return {
        "kb": base.name,
        "quarantined": sum(reasons.values()),
        "by_reason": reasons,
        "samples": [asdict(sample) for sample in samples],
    }


def _print_quarantine(document: dict[str, Any], where: str | None) -> None:
    if not document["quarantined"]:
        print("no sample is in quarantine" if where is None else f"no sample in quarantine has {where}")
        return
    print_columns(
        document["kb"], ["reason", "samples"], [(reason, str(n)) for reason, n in document["by_reason"].items()]
    )
    samples = document["samples"]
    places = [
        (shard_title(each["shard"]), each["key"], "" if each["offset"] is None else str(each["offset"]), each["reason"])
        for each in samples
    ]
    if places:
        title = f"{len(samples)} of {document['quarantined']}"
        print_columns(title, ["shard", "key", "offset", "reason"], places)


def _print_stats(document: dict[str, Any]) -> None:
    from index.search.sizes import gigabytes

    tables = ("snapshots", "searcher_manifest", "bytes_by_part", "quarantined_by_reason", "duplicates", "words")
    facts = {name: value for name, value in document.items() if name not in (*tables, "kb")}
    for name in ("datasets", "layouts"):
        facts[name] = ", ".join(f"{part} {number:,}" for part, number in document[name].items())
    facts["bytes"] = gigabytes(document["bytes"])
    print_table(document["kb"], _rows(facts))
    sizes = {part: gigabytes(size) for part, size in document["bytes_by_part"].items()}
    searcher = dict(document["searcher_manifest"] or {})
    curve = searcher.pop("curve", ())
    for name, table in (
        ("quarantined, by reason", document["quarantined_by_reason"]),
        ("bytes, by part", sizes),
        ("words", document.get("words")),
        ("duplicates", document["duplicates"]),
    ):
        if table:
            print_table(name, _rows(table))
    if document["snapshots"]:
        _print_records("snapshots", document["snapshots"])
    if searcher:
        print_table("searcher", _rows(searcher))
    if curve:
        _print_records("recall against speed", curve)


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values for a table, without those that say nothing."""
    return [(name, _cell(value)) for name, value in values.items() if value not in (None, "", {})]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else plain(value)


def _print_records(title: str, records: Sequence[dict[str, Any]]) -> None:
    print_columns(title, list(records[0]), [tuple(map(_cell, each.values())) for each in records])


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
        "dhash": None if pair.dhash is None else f"{pair.dhash % 2**64:016x}",
        "metadata": dict(pair.metadata),
    }
