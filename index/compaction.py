"""Compaction: fold what lags behind into searcher and indices, merge small files, purge what has been taken down.

Everything happens beside what readers use, and becomes visible in one commit or one rename. Kill it at any moment and
run it again.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from index.atomic import one_sentence
from index.errors import ConfigError
from index.ingest.parts import without_parts
from index.snapshots import drop, has_snapshot, holding_removed, move_newest, snapshots
from index.stats import folder_bytes

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase, SearcherChoice


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What a compaction did."""

    kb: str
    pairs: int
    bytes_before: int
    bytes_after: int
    fragments_before: int
    fragments_after: int
    versions_removed: int
    snapshots: tuple[str, ...]  # that are still there
    snapshots_dropped: tuple[str, ...]
    snapshots_dropped_for_removed: tuple[str, ...]  # their files held, if only as deleted rows, what was taken down
    searcher: str
    recall_at_10: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def compact(
    kb: "KnowledgeBase",
    *,
    keep: int | None = None,
    searcher: "SearcherChoice | None" = None,
    seed: int = 0,
    wait: float = 0,
    on_wait: Callable[[str], None] = lambda sentence: None,
) -> CompactReport:
    """Bring a knowledge base to its smallest and fastest form. `searcher` None: of the kind that it has.

    No answer changes, except that BM25 counts anew how rare each word is, and that a rebuilt searcher may approximate
    otherwise. `wait` and `on_wait` are those of `PairStore.lock`.

    Of the snapshots the newest `keep` stay (None: all), but for those whose files hold pairs that were taken down,
    those made after the removal included: to purge means to keep them nowhere. ConfigError for a negative number.
    """
    if keep is not None and keep < 0:
        raise ConfigError(f"keep is a number of snapshots, 0 or more, got {keep}")
    with without_parts(kb.store, wait=wait, on_wait=on_wait), one_sentence(kb.directory):
        kb.refresh()  # another process may have built while this one waited for its turn
        before, fragments_before = folder_bytes(kb.directory), kb.store.count_fragments()
        built = kb.build_search(searcher or kb.searcher_choice(), seed=seed)
        is_tagged = has_snapshot(kb.store)
        _merge_files(kb)
        if is_tagged:
            move_newest(kb.store)
        kb.store.index_ids()
        for_removed = tuple(holding_removed(kb.store))
        drop(kb.store, for_removed)
        too_many = _beyond(kb, keep)
        drop(kb.store, too_many)
        versions = kb.store.forget_versions()
        _sweep(kb)
        return CompactReport(
            kb=str(kb.directory),
            pairs=kb.store.count(),
            bytes_before=before,
            bytes_after=folder_bytes(kb.directory),
            fragments_before=fragments_before,
            fragments_after=kb.store.count_fragments(),
            versions_removed=versions,
            snapshots=tuple(each.tag for each in snapshots(kb.store)),
            snapshots_dropped=too_many,
            snapshots_dropped_for_removed=for_removed,
            searcher=built.kind,
            recall_at_10=built.recall_at_10,
        )


def _merge_files(kb: "KnowledgeBase") -> None:
    """Rewrite small and partly deleted files.

    The rows get new fragments, which are no new rows. `kb.json` says so before they are visible, by the names of the
    files, and simply by their numbers afterwards; killed in between, both are true.
    """
    rewritten = kb.store.rewrite_fragments()
    if rewritten is None:
        return
    _note(kb, moved_files=rewritten.files)
    kb.store.commit_rewrite(rewritten)
    _note(kb, covers=kb.store.high_water, moved_files=())


def _note(kb: "KnowledgeBase", **changes: Any) -> None:
    kb.manifest = replace(kb.manifest, **changes)
    kb.manifest.write(kb.directory)
    kb.store.moved_files = kb.manifest.moved_files


def _beyond(kb: "KnowledgeBase", keep: int | None) -> tuple[str, ...]:
    tags = [each.tag for each in snapshots(kb.store)]
    return () if keep is None else tuple(tags[: max(len(tags) - keep, 0)])


def _sweep(kb: "KnowledgeBase") -> None:
    """Delete what nothing names any more: earlier searchers, and temporary files of killed runs."""
    for folder in (kb.directory / "searchers").glob("*"):
        if f"searchers/{folder.name}" != kb.manifest.searcher:
            shutil.rmtree(folder)
    for leftover in [*kb.directory.glob(".*.new-*"), *kb.directory.glob("added/.*.new-*")]:
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    kb.sweep_added_images()
