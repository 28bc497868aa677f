"""Everything that `radt index stats` shows: what is there, what became of the rest, what lags behind, and its bytes."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.config import to_dict
from index.search.lexical import FTS_NAME

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.duplicates import DuplicatesManifest


def describe(kb: "KnowledgeBase") -> dict[str, Any]:
    """Sizes, model, searcher and history of a knowledge base, ready for JSON."""
    store = kb.store
    store.refresh()
    shards = store.shards()
    searcher = kb.searcher_manifest()
    duplicates = _duplicates(kb)
    parts = bytes_by_part(kb.directory) if kb.remote is None else _summed(kb.remote.sizes())
    lance_stats = store.dataset.stats.dataset_stats()
    return {
        "kb": kb.name,
        "pairs": store.count(),
        "datasets": store.datasets(),
        "shards": len(shards),
        "layouts": dict(Counter(shard.layout or "not known" for shard in shards)),
        "quarantined": store.count_bad(),
        "quarantined_by_reason": store.reasons(),
        "removed": store.count_removed(),
        "model": kb.manifest.model,
        "fingerprint": kb.manifest.fingerprint,
        "dim": kb.manifest.dim,
        "format": kb.manifest.format,
        "created": kb.manifest.created,
        "searcher": None if searcher is None else searcher.kind,
        "recall_at_10": None if searcher is None else searcher.recall_at_10,
        "searcher_manifest": None if searcher is None else to_dict(searcher),
        "not_in_searcher": kb.unsearched(),
        "not_in_word_index": store.count_unindexed(FTS_NAME),
        "duplicates": None if duplicates is None else to_dict(duplicates),
        "snapshot": store.version,
        "snapshots": [to_dict(each) for each in kb.snapshots()],
        "fragments": int(lance_stats["num_fragments"]),
        "deleted_rows": int(lance_stats["num_deleted_rows"]),
        "versions": len(store.dataset.versions()),
        "bytes": sum(parts.values()),
        "bytes_by_part": parts,
    }


def _duplicates(kb: "KnowledgeBase") -> "DuplicatesManifest | None":
    from index.search.duplicates import Duplicates

    name = kb.manifest.searcher
    return Duplicates.open(kb.directory / name).manifest if name else None


def folder_bytes(directory: Path) -> int:
    """Size of everything in a folder."""
    return sum(bytes_by_part(directory).values())


def bytes_by_part(directory: Path) -> dict[str, int]:
    """Bytes of each part of the folder: the rows, the indices and the history of the table, the searchers, the rest."""
    return _summed(_sizes(directory))


def _sizes(directory: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    for folder, _, names in os.walk(directory):  # unlike rglob at ease when another process is cleaning up
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                yield path.relative_to(directory).parts, path.stat().st_size


def _summed(sizes: Iterable[tuple[tuple[str, ...], int]]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for names, size in sizes:
        parts[_part_of(names)] = parts.get(_part_of(names), 0) + size
    return dict(sorted(parts.items()))


def _part_of(names: tuple[str, ...]) -> str:
    if names[0] == "pairs.lance" and len(names) > 1:
        return {"data": "rows", "_indices": "word and id indices"}.get(names[1], "history")
    return names[0] if len(names) > 1 or names[0] in ("searchers", "added") else "other"
