"""Removals: what has been taken down for good, and what goes with a pair when it goes with its image.

Only an id stays of a pair that is taken down; of an image, its digest and the addresses it is known to lie at. So what
is forbidden to come in and what must go are one rule: no pair that is there may be one that `Removed` forbids.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from index.conditions import digest_in, id_in
from index.records import StoredPair
from index.rows import address, removed_row

if TYPE_CHECKING:
    import lance

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Removed:
    """What has been taken down for good: pairs, and images that no pair may show, by content or by address."""

    ids: frozenset[int]
    digests: frozenset[str]
    urls: frozenset[str]

    @classmethod
    def read(cls, table: "lance.LanceDataset") -> "Removed":
        """All that a version of the table says."""
        rows = table.to_table(columns=["id", "image_sha256", "metadata"], filter="kind = 'removed'")
        ids, digests, named = (column.to_pylist() for column in rows.columns)
        urls = {address(json.loads(text)) for text in named if text}
        return cls(frozenset(ids), frozenset(digests) - {None}, frozenset(urls) - {""})

    def forbids(self, pair: StoredPair) -> bool:
        """Whether it shows such an image."""
        return pair.sha256 in self.digests or bool(self.urls and address(pair.metadata) in self.urls)


def graves(table: "lance.LanceDataset", where: str, *, same_image: bool) -> list[Row]:
    """The rows that say what is taken down: one for each pair that the filter `where` leaves.

    `same_image`: for those, too, that show the same bytes, at whatever address, and then for all from any of these
    addresses. The other bytes that those show are not forbidden elsewhere: an address that is dead by now may have
    given the same placeholder as a thousand others.
    """
    named = ["id", "dataset", "shard"]
    if not same_image:
        return [removed_row(row, with_image=False) for row in _pairs(table, where, named)]
    digests = {row["image_sha256"] for row in _pairs(table, where, ["image_sha256"])} - {None}
    shown = _pairs(table, f"({where}) OR {digest_in(digests)}", [*named, "image_sha256", "metadata"])
    urls = {address(json.loads(row["metadata"])) for row in shown} - {""}
    others = _ids_from(table, urls) - {row["id"] for row in shown}
    return [
        *(removed_row(row, with_image=True) for row in shown),
        *(removed_row(row, with_image=False) for row in _pairs(table, id_in(sorted(others)), named)),
    ]


def _pairs(table: "lance.LanceDataset", where: str, columns: list[str]) -> list[Row]:
    rows: list[Row] = table.to_table(columns=columns, filter=f"kind = 'pair' AND ({where})").to_pylist()
    return rows


def _ids_from(table: "lance.LanceDataset", urls: Collection[str]) -> set[int]:
    """The pairs whose images were downloaded from these addresses: all metadata is read, some seconds a million."""
    if not urls:
        return set()
    found: set[int] = set()
    for batch in table.to_batches(columns=["id", "metadata"], filter="kind = 'pair'"):
        rows = zip(batch.column("id").to_pylist(), batch.column("metadata").to_pylist(), strict=True)
        found.update(number for number, text in rows if address(json.loads(text)) in urls)
    return found
