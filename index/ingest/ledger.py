"""The ledger: which shards are in the store, and whether they are still what they were, so a build is exactly once.

Its entries are rows of the store itself (see `index/store.py`), so there is nothing that could disagree with the data.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from posixpath import join

import numpy as np
from jaxtyping import Int64

from index.errors import CorpusError
from index.ingest.readers import Shard
from index.ingest.sources import FRAGMENT
from index.records import ShardRecord, StoredPair, shard_title
from index.search.ids import contains
from index.store import PairStore


@dataclass(frozen=True, kw_only=True, slots=True)
class PairName:
    """All that a claim needs to know of a pair: what came back from another machine, or waited for the lock."""

    id: int
    dataset: str
    shard: str
    key: str


class Ledger:
    """What a build may skip, what it must make again, and whether an id belongs to another pair."""

    def __init__(self, store: PairStore):
        self._store = store
        self._records = {(record.dataset, record.shard): record for record in store.shards()}
        self._met: dict[tuple[str, str], str] = {}  # the shards of this build, and their sources
        self._replaced: Counter[tuple[str, str]] = Counter()  # pairs of these shards that were there already
        self._known = KnownIds(store.matching_ids())
        self._high_water = store.high_water

    def find(self, shard: Shard) -> ShardRecord | None:
        """The entry of this shard, if there is one."""
        return self._records.get((shard.dataset, shard.name))

    def has(self, record: ShardRecord) -> bool:
        """Whether an earlier form of this shard is in the store."""
        return (record.dataset, record.shard) in self._records

    def meet(self, shard: Shard) -> bool:
        """Whether this build sees the shard for the first time. CorpusError when two sources claim the same name."""
        name = (shard.dataset, shard.name)
        earlier = self._met.setdefault(name, "")
        record = self._records.get(name)
        other = earlier or (record.source if record is not None else "")
        if other not in ("", shard.source) and (earlier or (record is not None and _is_there(record))):
            raise CorpusError(
                f"shard {shard_title(shard.name)!r} of dataset {shard.dataset!r} is in {other} and in {shard.source} "
                "too; give one of them another name with --dataset"
            )
        self._met[name] = shard.source
        return not earlier

    def replaced(self, record: ShardRecord) -> int:
        """How many of the pairs claimed for a shard of this build were in the store before."""
        return self._replaced[record.dataset, record.shard]

    def named_otherwise(self) -> list[ShardRecord]:
        """Entries of the very shards that this build has met, made under the name of another dataset that has pairs."""
        met = {(source, shard): dataset for (dataset, shard), source in self._met.items()}
        others = [r for r in self._records.values() if met.get((r.source, r.shard), r.dataset) != r.dataset]
        there = self._store.datasets() if others else {}
        return [record for record in others if record.dataset in there]

    def enter(self, record: ShardRecord) -> None:
        """Note a shard that has just been committed."""
        self._records[record.dataset, record.shard] = record

    def refresh(self) -> None:
        """Take in what other processes have committed since."""
        ids, records = self._store.landed_after(self._high_water)
        new = ids[~np.isin(ids, self._known.among(ids))]
        if len(new):
            self._known.add(new)
        for record in records:
            self.enter(record)
        self._high_water = self._store.high_water

    def holds(self, record: ShardRecord) -> bool:
        """Whether this very shard, as it is now, is in the store."""
        return self._records.get((record.dataset, record.shard)) == record

    def met(self) -> list[ShardRecord]:
        """The entries of all shards that this build came upon, old and new."""
        return [self._records[name] for name in self._met if name in self._records]

    def unmet(self, sources: Iterable[str]) -> list[ShardRecord]:
        """The entries of these sources that this build did not come upon, under the name of any dataset.

        A single shard is no source here.
        """
        whole = {_path(source) for source in sources}
        there = {(source, shard) for (_, shard), source in self._met.items()}
        others = [r for name, r in self._records.items() if name not in self._met and (r.source, r.shard) not in there]
        return [record for record in others if _path(record.source) in whole]

    def claim(self, pairs: Sequence[StoredPair | PairName]) -> None:
        """Take the ids of pairs about to be stored. CorpusError when one belongs to another pair."""
        ids = np.array([pair.id for pair in pairs], np.int64)
        taken = set(self._known.among(ids).tolist())
        own = {(row.id, row.dataset, row.shard, row.key) for row in self._store.get(sorted(taken))}
        claimed: set[int] = set()
        for pair in pairs:
            is_own = (pair.id, pair.dataset, pair.shard, pair.key) in own  # its shard is being made again
            if pair.id in claimed or (pair.id in taken and not is_own):
                raise CorpusError(
                    f"the id {pair.id} of {pair.key!r} in shard {shard_title(pair.shard)!r} belongs to another pair "
                    "already; name the dataset differently with --dataset"
                )
            claimed.add(pair.id)
            self._replaced[pair.dataset, pair.shard] += is_own
        self._known.add(ids)


class KnownIds:
    """A set of ids in sorted arrays of growing length, 8 bytes an id: a Python set would take ten times that."""

    def __init__(self, ids: Int64[np.ndarray, " n"]):
        self._parts = [np.sort(ids)]

    def among(self, ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " k"]:
        """Those of `ids` that are in the set."""
        found = np.zeros(len(ids), bool)
        for part in self._parts:
            found |= contains(part, ids)
        return ids[found]

    def add(self, ids: Int64[np.ndarray, " n"]) -> None:
        """Put ids in. Parts merge when they are of like length, so each id is moved a logarithmic number of times."""
        self._parts.append(np.sort(ids))
        while len(self._parts) > 1 and 2 * len(self._parts[-1]) >= len(self._parts[-2]):
            self._parts[-2:] = [np.sort(np.concatenate(self._parts[-2:]))]


def _path(source: str) -> str:
    from fsspec.core import url_to_fs

    return str(url_to_fs(source)[1]).rstrip("/")


def _is_there(record: ShardRecord) -> bool:
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(join(record.source, FRAGMENT.sub("", record.shard)))
    return bool(fs.exists(path))
