"""Snapshots: every build leaves a tag in the table, so that an earlier state can be asked; `compact` lets them go.

A snapshot shares its files with the present, so it costs what has been replaced or compacted since.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from index.atomic import one_sentence
from index.store import PairStore


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
    """Tags of the snapshots whose files still hold pairs that have been taken down since."""
    return [each.tag for each in snapshots(store) if PairStore(store.directory, snapshot=each.tag).hidden]


def _snapshot(name: str, tag: Any) -> Snapshot:
    metadata = tag.get("metadata") or {}
    return Snapshot(
        tag=name,
        version=int(tag["version"]),
        created=tag["created_at"].isoformat(timespec="seconds"),
        pairs=int(metadata.get("pairs", 0)),
        in_searcher=int(metadata.get("in_searcher", 0)),
    )
