"""Snapshots: every build leaves a tag in the table, so that an earlier state can be asked; `compact` lets them go.

A snapshot shares its files with the present, so it costs what has been replaced or compacted since.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from index.atomic import one_sentence
from index.search.ids import contains
from index.store import PairStore

if TYPE_CHECKING:
    import lance


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The state that a build left. `in_searcher` of its pairs were in its searcher, the others compared one by one."""

    tag: str
    version: int
    created: str  # ISO 8601, UTC
    pairs: int
    in_searcher: int


def snapshots(store: PairStore) -> list[Snapshot]:
    """All snapshots, oldest first."""
    tags = sorted(store.dataset.tags.list().items(), key=lambda item: int(item[1]["version"]))
    return [_snapshot(name, tag) for name, tag in tags]


def tag_build(store: PairStore, number: int, *, in_searcher: int) -> None:
    """Name the present state `build-NUMBER`."""
    name = f"build-{number}"
    with store.lock(), one_sentence(store.directory):
        tags = store.dataset.tags
        if name in tags.list():  # of a build that was killed before kb.json counted it
            tags.delete(name)
        tags.create(name, store.version)
        counts = {"pairs": store.count(), "in_searcher": in_searcher, "high_water": store.high_water}
        tags.replace_metadata(name, {key: str(value) for key, value in counts.items()})


def move_newest(store: PairStore) -> None:
    """Let the newest snapshot be the present state: it has the same pairs."""
    with store.lock(), one_sentence(store.directory):
        tags = store.dataset.tags
        name, tag = max(tags.list().items(), key=lambda item: int(item[1]["version"]))
        if int(tag["version"]) != store.version:
            tags.update(name, store.version)
            tags.replace_metadata(name, {**(tag.get("metadata") or {}), "high_water": str(store.high_water)})


def has_snapshot(store: PairStore) -> bool:
    """Whether nothing has been written since the newest snapshot."""
    tags = store.dataset.tags.list().values()
    newest = max(tags, key=lambda tag: int(tag["version"]), default=None)
    return newest is not None and (newest.get("metadata") or {}).get("high_water") == str(store.high_water)


def drop(store: PairStore, tags: Collection[str]) -> None:
    """Forget snapshots; their files go when the table is cleaned."""
    with store.lock(), one_sentence(store.directory):
        for tag in tags:
            store.dataset.tags.delete(tag)


def holding_removed(store: PairStore) -> list[str]:
    """Tags of the snapshots whose files still hold, or may hold, pairs that have been taken down before or since.

    A row that is deleted lies in its file, and its words in the index, until they are written anew.
    """
    removed = np.array(sorted(store.removed_ids()), dtype=np.int64)
    if not len(removed):
        return []
    tables = {each.tag: store.dataset.checkout_version(each.tag) for each in snapshots(store)}
    holds: dict[int, bool] = {}
    for table in tables.values():
        for fragment in table.get_fragments():
            if fragment.fragment_id not in holds:
                holds[fragment.fragment_id] = _holds(table, fragment, removed)
    # A fragment that the words were read from, and that no snapshot has any more, cannot be looked into.
    return [tag for tag, table in tables.items() if any(holds.get(number, True) for number in _fragments(table))]


def _holds(table: "lance.LanceDataset", fragment: Any, removed: Int64[np.ndarray, " n"]) -> bool:
    """Whether one of these pairs lies in the files of a fragment, deleted or not."""
    scanner = table.scanner(
        columns=["id"],
        filter="kind = 'pair'",
        fragments=[fragment],
        with_row_id=True,  # Lance gives deleted rows only so
        include_deleted_rows=True,
        use_scalar_index=False,  # an index may know the living alone
    )
    return any(contains(removed, batch.column("id").to_numpy()).any() for batch in scanner.to_batches())


def _fragments(table: "lance.LanceDataset") -> set[int]:
    """The fragments of a version, and those that its word index was made of."""
    own = {fragment.fragment_id for fragment in table.get_fragments()}
    words = [index for index in table.describe_indices() if index.field_names == ["caption"]]
    return own.union(*(segment.fragment_ids for index in words for segment in index.segments))


def _snapshot(name: str, tag: Any) -> Snapshot:
    metadata = tag.get("metadata") or {}
    return Snapshot(
        tag=name,
        version=int(tag["version"]),
        created=tag["created_at"].isoformat(timespec="seconds"),
        pairs=int(metadata.get("pairs", 0)),
        in_searcher=int(metadata.get("in_searcher", 0)),
    )
