"""RowMap: where every pair of one version of the table lies, so that a few of very many are read without a search.

Lance looks ids up in an index, reads the id of every row it finds, and evaluates a filter over all rows for each query.
With ids and addresses in memory none of that is needed: a search answers with addresses, and is given those of the
rows that may be found.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64
from numpy import ndarray

from index.search.ids import contains

if TYPE_CHECKING:
    import lance
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMap:
    """Ids and row addresses of the pairs at one version: 24 bytes a pair."""

    dataset: "lance.LanceDataset"  # at that version: an address means nothing at another
    ids: Int64[ndarray, " n"]  # ascending
    addresses: UInt64[ndarray, " n"]  # ascending
    id_at: Int32[ndarray, " n"]  # where in `ids` the id of each address is
    address_at: Int32[ndarray, " n"]  # where in `addresses` the address of each id is
    hidden: bytes | None = None  # a mask of rows that are there and must not be found

    @classmethod
    def load(cls, dataset: "lance.LanceDataset", *, hidden: Collection[int] = ()) -> "RowMap":
        """Read ids and addresses, 0.2 s for a million; the pairs in `hidden` count as gone."""
        own = dataset.checkout_version(dataset.version)  # another thread's commit moves the one that was given on
        table = own.to_table(columns=["id"], filter="kind = 'pair'", with_row_address=True)
        ids, addresses = table.column("id").to_numpy(), table.column("_rowaddr").to_numpy()
        mask = None
        if hidden:
            is_hidden = contains(np.array(sorted(hidden), dtype=np.int64), ids)
            mask = _mask(addresses[is_hidden])
            ids, addresses = ids[~is_hidden], addresses[~is_hidden]
        by_address = np.argsort(addresses, kind="stable")  # they mostly are in order
        ids, addresses = ids[by_address], addresses[by_address]
        by_id = np.argsort(ids)
        id_at = np.empty(len(ids), dtype=np.int32)
        id_at[by_id] = np.arange(len(ids), dtype=np.int32)
        return cls(
            dataset=own,
            ids=ids[by_id],
            addresses=addresses,
            id_at=id_at,
            address_at=by_id.astype(np.int32),
            hidden=mask,
        )

    def ids_at(self, addresses: UInt64[ndarray, " k"]) -> tuple[Int64[ndarray, " k"], Bool[ndarray, " k"]]:
        """The ids of the pairs at these addresses, and at which of them there is one."""
        if not len(self.ids):
            return np.zeros(len(addresses), dtype=np.int64), np.zeros(len(addresses), dtype=bool)
        at, order = np.empty(len(addresses), dtype=np.int64), np.argsort(addresses)
        at[order] = np.searchsorted(self.addresses, addresses[order])  # thrice as fast as in the order of the scores
        at = np.minimum(at, len(self.ids) - 1)
        return self.ids[self.id_at[at]], self.addresses[at] == addresses

    def mask(self, ids: Int64[ndarray, " k"]) -> bytes:
        """The rows of those of the ids that are there, as Lance's scanner takes them: `row_addr_allowlist`."""
        at = np.searchsorted(self.ids, ids[contains(self.ids, ids)])
        return _mask(self.addresses[self.address_at[at]])

    def read(self, ids: Int64[ndarray, " k"], columns: Sequence[str]) -> "pa.Table":
        """These columns of the pairs that are there, in stored order."""
        return self.dataset.scanner(columns=list(columns), row_addr_allowlist=self.mask(ids)).to_table()


def _mask(addresses: UInt64[ndarray, " k"]) -> bytes:
    from lance.dataset import serialize_row_addrs

    made: Any = serialize_row_addrs(addresses.tolist())
    return bytes(made)
