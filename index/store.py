"""PairStore: the one LanceDB table of a knowledge base, with pairs, ledger, quarantine and removals side by side.

Everything that must change together is one Lance commit: a shard's pairs, its bad samples and its ledger entry, or a
removal and its tombstone. One writer at a time, by a lock file; readers need no lock.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64

from index.atomic import one_sentence
from index.conditions import bad_where, id_in, of_shards, possible_ids
from index.errors import KnowledgeBaseError, QueryError
from index.filters import BAD_FIELDS, filter_errors
from index.lock import writer_lock
from index.records import BadSample, ShardRecord, ShownPair, StoredPair, table_schema
from index.remote import RemoteFolder
from index.removals import Removed, graves
from index.row_map import RowMap
from index.rows import (
    PAIR_COLUMNS,
    SHARD_COLUMNS,
    SHOWN_COLUMNS,
    TABLE,
    arrow_table,
    bad_row,
    ledger_row,
    pair_row,
    removed_row,
    shard_record,
    shown_pair,
    stored_pair,
)

if TYPE_CHECKING:
    import lance
    import lancedb.table
    import pyarrow as pa

INDEX_ROWS = 20_000  # rows from which an index on ids pays: 300,000 rows took 22 ms to scan and 4 ms to look up
SMALL_ROWS = 4096  # a shard's rows, when fewer, wait in memory to share a fragment with other shards' of the commit
SMALL_BYTES = 8 << 20
CREATE_SECONDS = 30.0  # when several processes begin with a knowledge base at once, one of them makes the table
_TAGS_NAMED = 8  # when one that is asked for is not there
FRAGMENT_ROWS = 262_144  # of a compacted fragment: what one removal makes the next compaction write anew
BATCH_BYTES = 64 << 20  # held while fragments are written anew
MAP_ROWS = 1 << 25  # pairs up to which it is held in memory where each lies: 24 bytes each, and 0.2 s for a million,
MAP_SHARE = 0.001  # which so many look-ups repay; a command that asks once goes without


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """Rows that are ready and not yet visible: few in memory, many on disk as Lance's fragments."""

    tables: tuple["pa.Table", ...] = ()
    fragments: tuple[Any, ...] = ()
    pairs: int = 0  # how many will be there
    forbidden: int = 0  # that were turned away, because their image has been taken down

    @classmethod
    def together(cls, blocks: Iterable["Staged"]) -> "Staged":
        """All these rows, in this order."""
        each = list(blocks)
        return cls(
            tables=tuple(table for block in each for table in block.tables),
            fragments=tuple(fragment for block in each for fragment in block.fragments),
            pairs=sum(block.pairs for block in each),
            forbidden=sum(block.forbidden for block in each),
        )

    @property
    def bytes_in_memory(self) -> int:
        """What waits there for the commit."""
        return sum(table.nbytes for table in self.tables)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrite:
    """Fragments that have been written anew and wait for their commit, and the names of their files."""

    results: Sequence[Any]
    files: tuple[str, ...]


class PairStore:
    """Put, get, filter, version and take down the pairs of one knowledge base folder. Ids are ours, and stable."""

    def __init__(self, directory: Path, *, snapshot: str | None = None, remote: RemoteFolder | None = None):
        import lance

        self.directory = directory
        self.remote = remote  # where the table is, if not in the folder
        self.root = str(directory) if remote is None else remote.url
        self.moved_files: Collection[str] = ()  # data files of rows that a compaction moved: not new, see `rows_after`
        self._uri = f"{self.root}/{TABLE}.lance"
        try:
            self._dataset = lance.dataset(self._uri)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise KnowledgeBaseError(f"the table of {self.root} cannot be read ({reason})") from error
        # The tag whose version is read, and never written; None: the newest.
        self.snapshot = None if snapshot is None else self._tag(snapshot)
        if self.snapshot is not None:
            self._dataset = self._dataset.checkout_version(self.snapshot)
        self.hidden = self._hidden() if snapshot is not None else frozenset[int]()
        self._table: Any = None
        self._removed: Removed | None = None
        self.before_writing: Callable[[], None] | None = None  # what the next writer's lock begins with, once
        self._lock_file: IO[str] | None = None
        self._mutex = threading.RLock()  # the file keeps other processes out, this the other threads
        self._map_mutex = threading.Lock()
        self._map: RowMap | None = None
        self._mapped: tuple[int, frozenset[int]] | None = None  # the version and what is hidden in it
        self._looked_up = 0  # at that version

    @classmethod
    def create(cls, directory: Path, *, dim: int) -> "PairStore":
        """Make an empty table for vectors of `dim` numbers, unless there is one. KnowledgeBaseError from the disk."""
        with writer_lock(directory, wait=CREATE_SECONDS), one_sentence(directory):
            if not cls.exists(directory):
                cls.make(directory, dim=dim)
        return cls(directory)

    @staticmethod
    def make(directory: Path, *, dim: int) -> None:
        """`create` for who holds the writer's lock and knows that there is no table."""
        import lance

        schema = table_schema(dim)
        lance.write_dataset(schema.empty_table(), str(directory / f"{TABLE}.lance"), schema=schema, mode="create")

    @classmethod
    def exists(cls, directory: Path) -> bool:
        """Whether a table lies in this folder."""
        versions = directory / f"{TABLE}.lance" / "_versions"  # a folder without it is what a killed `create` leaves
        return versions.is_dir() and any(versions.iterdir())

    # What it is

    @property
    def dataset(self) -> "lance.LanceDataset":
        """The pylance dataset at the version this store reads."""
        return self._dataset

    @property
    def table(self) -> "lancedb.table.LanceTable":
        """The lancedb table; it always reads the newest version."""
        import lancedb

        if self._table is None:
            connection = lancedb.connect(self.root, read_consistency_interval=timedelta(0))
            self._table = connection.open_table(TABLE)
        return self._table

    @property
    def version(self) -> int:
        """Grows with every commit, those of indices included."""
        return int(self._dataset.version)

    @property
    def high_water(self) -> int:
        """The newest fragment's number: what `rows_after` takes. -1 in an empty store."""
        return max((fragment.fragment_id for fragment in self._dataset.get_fragments()), default=-1)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self._dataset.schema.field("vector").type.list_size)

    def refresh(self) -> bool:
        """See what others have committed; whether there was anything. A snapshot hears of removals only."""
        import lance

        if self.snapshot is not None:
            before, self.hidden = self.hidden, self._hidden()
            return self.hidden != before
        if self._dataset.latest_version == self._dataset.version:
            return False
        self._dataset = lance.dataset(self._uri)
        return True

    # Reading

    def count(self, where: str | None = None) -> int:
        """How many pairs there are, or how many the SQL filter lets through."""
        with filter_errors(where):
            return int(self._dataset.count_rows(self._pairs_where(where)))

    def has_rows(self) -> bool:
        """Whether anything was ever brought in, be it a ledger entry or a removal."""
        return bool(self._dataset.count_rows())

    def matching_ids(self, where: str | None = None) -> Int64[np.ndarray, " n"]:
        """Ids of the pairs that the SQL filter lets through, in stored order."""
        with filter_errors(where):
            table = self._dataset.to_table(columns=["id"], filter=self._pairs_where(where))
        return table.column("id").to_numpy().astype(np.int64, copy=False)

    def captions(self, where: str | None = None) -> tuple[Int64[np.ndarray, " n"], list[str]]:
        """Ids and captions, in stored order."""
        with filter_errors(where):
            table = self._dataset.to_table(columns=["id", "caption"], filter=self._pairs_where(where))
        return table.column("id").to_numpy().astype(np.int64, copy=False), table.column("caption").to_pylist()

    def ids_and_vectors(self, where: str | None = None) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
        """Ids and unit vectors, in stored order; all in memory, so 2 GB for a million of 512."""
        with filter_errors(where):
            return self._arrays(self._dataset.to_batches(columns=["id", "vector"], filter=self._pairs_where(where)))

    def vector_batches(
        self, rows: int, where: str | None = None
    ) -> Iterator[tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]]:
        """Ids and unit vectors in stored order, at most `rows` of them in memory at once."""
        with filter_errors(where):
            scanner = self._dataset.scanner(
                columns=["id", "vector"], filter=self._pairs_where(where), batch_size=rows, batch_readahead=1
            )
            for batch in scanner.to_batches():
                if len(batch):
                    vectors = batch.column("vector").flatten().to_numpy().reshape(-1, self.dim)
                    yield batch.column("id").to_numpy(), vectors

    def rows_after(self, high_water: int) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
        """Ids and vectors of the pairs written since `high_water` was read: those a searcher of then cannot know."""
        newer = self._fragments_after(high_water)
        if not newer:
            return np.empty(0, np.int64), np.empty((0, self.dim), np.float32)
        scanner = self._dataset.scanner(columns=["id", "vector"], filter=self._pairs_where(None), fragments=newer)
        return self._arrays(scanner.to_batches())

    def count_after(self, high_water: int) -> int:
        """How many rows `rows_after` would give."""
        newer = self._fragments_after(high_water)
        return sum(int(fragment.count_rows(self._pairs_where(None))) for fragment in newer)

    def get(
        self, ids: Sequence[int] | Int64[np.ndarray, " n"], *, vectors: bool = False, thumbnails: bool = False
    ) -> list[StoredPair]:
        """Rows in the order of `ids`; an id that is not there (any more) is left out."""
        wanted = [int(i) for i in ids]
        if not wanted:
            return []
        columns = [*PAIR_COLUMNS, *["vector"] * vectors, *["thumbnail"] * thumbnails]
        found = {row["id"]: row for row in self._named(wanted, columns).to_pylist()}
        return [stored_pair(found[i], self.root) for i in wanted if i in found]

    def shown(self, ids: Sequence[int] | Int64[np.ndarray, " n"]) -> list[ShownPair]:
        """`get`, of every row only what a hit shows."""
        wanted = [int(i) for i in ids]
        found = {row["id"]: row for row in self._named(wanted, SHOWN_COLUMNS).to_pylist()} if wanted else {}
        return [shown_pair(found[i], self.root) for i in wanted if i in found]

    def captions_of(self, ids: Int64[np.ndarray, " k"]) -> dict[int, str]:
        """The captions of those of these pairs that are there, by id."""
        table = self._named(ids.tolist(), ["id", "caption"])
        return dict(zip(table.column("id").to_pylist(), table.column("caption").to_pylist(), strict=True))

    def vectors_of(self, ids: Int64[np.ndarray, " k"]) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
        """Ids and unit vectors of those of these pairs that are there, in stored order."""
        return self._arrays(self._named(ids.tolist(), ["id", "vector"]).to_batches())

    def known(self, columns: Sequence[str]) -> list[str]:
        """Those of these columns that the table has: one of an older format lacks what came later."""
        return [name for name in columns if name in self._dataset.schema.names]

    def row_map(self, lookups: int) -> RowMap | None:
        """Where the pairs of the present version lie; None until `lookups`, added up, repay reading that."""
        now = (self.version, self.hidden)
        with self._map_mutex:
            if self._mapped != now:
                self._mapped, self._map, self._looked_up = now, None, 0
            self._looked_up += lookups
            if self._map is None:
                rows = int(self._dataset.count_rows())
                if MAP_SHARE * rows < self._looked_up and rows <= MAP_ROWS:
                    self._map = RowMap.load(self._dataset, hidden=self.hidden)
            return self._map

    def shards(self) -> list[ShardRecord]:
        """The ledger: every shard that is in the store, the empty ones too."""
        rows = self._dataset.to_table(columns=SHARD_COLUMNS, filter="kind = 'shard'").to_pylist()
        return [shard_record(row) for row in rows]

    def landed_after(self, high_water: int) -> tuple[Int64[np.ndarray, " n"], list[ShardRecord]]:
        """Ids of the pairs and ledger entries written since `high_water` was read."""
        newer = [f for f in self._dataset.get_fragments() if f.fragment_id > high_water]
        if not newer:
            return np.empty(0, np.int64), []
        pairs = self._dataset.scanner(columns=["id"], filter="kind = 'pair'", fragments=newer).to_table()
        shards = self._dataset.scanner(columns=SHARD_COLUMNS, filter="kind = 'shard'", fragments=newer).to_table()
        ids = pairs.column("id").to_numpy().astype(np.int64, copy=False)
        return ids, [shard_record(row) for row in shards.to_pylist()]

    def bad_samples(self, where: str | None = None, *, limit: int | None = None) -> list[BadSample]:
        """The quarantine, or what an SQL filter over `dataset`, `shard`, `key`, `image_offset`, `reason` leaves."""
        return list(self.each_bad_sample(where, limit=limit))

    def each_bad_sample(self, where: str | None = None, *, limit: int | None = None) -> Iterator[BadSample]:
        """`bad_samples`, a few in memory at once."""
        columns = ["shard", "key", "image_offset", "reason"]
        with filter_errors(where, fields=BAD_FIELDS):
            for batch in self._dataset.to_batches(columns=columns, filter=bad_where(where), limit=limit):
                for row in batch.to_pylist():
                    yield BadSample(
                        shard=row["shard"], key=row["key"], offset=row["image_offset"], reason=row["reason"]
                    )

    def count_bad(self) -> int:
        """Size of the quarantine."""
        return int(self._dataset.count_rows("kind = 'bad'"))

    def count_removed(self) -> int:
        """How many pairs have been taken down for good."""
        return int(self._dataset.count_rows("kind = 'removed'"))

    def removed_ids(self) -> set[int]:
        """Ids of the pairs that have been taken down for good."""
        return set(self._dataset.to_table(columns=["id"], filter="kind = 'removed'").column("id").to_pylist())

    def count_unindexed(self, index: str) -> int:
        """Pairs written since an index of the table was built; all of them when there is no such index."""
        segments = [s for each in self._dataset.describe_indices() if each.name == index for s in each.segments]
        covered = {fragment for segment in segments for fragment in segment.fragment_ids}
        newer = [f for f in self._dataset.get_fragments() if f.fragment_id not in covered]
        return sum(int(fragment.count_rows(self._pairs_where(None))) for fragment in newer)

    def reasons(self, where: str | None = None) -> dict[str, int]:
        """Bad samples by reason, most first. What a reason says of the single sample, after a colon, is left out."""
        counts: Counter[str] = Counter()
        with filter_errors(where, fields=BAD_FIELDS):
            for batch in self._dataset.to_batches(columns=["reason"], filter=bad_where(where)):
                for entry in batch.column("reason").value_counts().to_pylist():
                    counts[entry["values"].partition(":")[0]] += entry["counts"]
        return dict(counts.most_common())

    def datasets(self) -> dict[str, int]:
        """Pairs per dataset name, sorted by name."""
        counts: dict[str, int] = {}
        for batch in self._dataset.to_batches(columns=["dataset"], filter=self._pairs_where(None)):
            for entry in batch.column("dataset").value_counts().to_pylist():
                counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        return dict(sorted(counts.items()))

    def image_uris(self, where: str) -> set[str]:
        """Where the images of the pairs that the SQL filter leaves lie, as the rows have it: ours are relative."""
        table = self._dataset.to_table(columns=["image_uri"], filter=self._pairs_where(where))
        return set(table.column("image_uri").to_pylist())

    def shown_where(self, where: str | None) -> str | None:
        """A filter for who scans `dataset` himself: of a snapshot, what has been taken down since is left out."""
        if not self.hidden:
            return where
        hidden = f"NOT ({id_in(sorted(self.hidden))})"
        return f"({where}) AND {hidden}" if where else hidden

    # Writing

    @contextmanager
    def lock(self, wait: float = 0, *, on_wait: Callable[[str], None] = lambda owner: None) -> Iterator[None]:
        """Hold the writer's lock, also when this thread holds it already.

        When another process has it, wait up to `wait` seconds, after telling `on_wait` which one it is;
        KnowledgeBaseError when it still has it then.
        """
        if self.remote is not None:
            raise self.remote.refuse()
        if self.snapshot is not None:
            raise KnowledgeBaseError(f"the snapshot {self.snapshot} is the past and cannot be changed; leave it out")
        with self._mutex:
            if self._lock_file is not None:
                yield
                return
            with writer_lock(self.directory, wait=wait, on_wait=on_wait) as file:
                self._lock_file, self._removed = file, None
                try:
                    self.refresh()
                    if self.before_writing is not None:
                        self.before_writing()
                        self.before_writing = None
                    yield
                finally:
                    self._lock_file = None

    def stage(
        self, pairs: Sequence[StoredPair], *, record: ShardRecord | None = None, bad: Sequence[BadSample] = ()
    ) -> Staged:
        """Make rows ready, not yet visible; hand the result to `commit_shards`. Removed ids are dropped.

        A pair that shows an image which `remove` has forbidden is dropped too, and counts as removed from then on.
        The last rows of a shard bring its ledger entry and its bad samples with them. Many rows go to disk at once;
        a few stay in memory until the commit, where they share a fragment with those of other shards.
        """
        removed = self._taken_down()
        pairs = [pair for pair in pairs if pair.id not in removed.ids]
        welcome = [pair for pair in pairs if not removed.forbids(pair)]
        new = [pair_row(pair) for pair in welcome]
        new += [removed_row(pair, with_image=False) for pair in pairs if removed.forbids(pair)]
        if record is not None:
            new += [*(bad_row(record, sample) for sample in bad), ledger_row(record)]
        staged = Staged(pairs=len(welcome), forbidden=len(pairs) - len(welcome))
        if not new:
            return staged
        table = arrow_table(new, self._dataset.schema)
        if table.num_rows < SMALL_ROWS and table.nbytes < SMALL_BYTES:
            return replace(staged, tables=(table,))
        return replace(staged, fragments=tuple(self._write_fragments(table)))

    def commit_shard(self, record: ShardRecord, staged: Staged, *, is_new: bool = False) -> None:
        """`commit_shards` of one."""
        self.commit_shards([(record, staged)], replaced=() if is_new else (record,))

    def commit_shards(self, shards: Sequence[tuple[ShardRecord, Staged]], *, replaced: Collection[ShardRecord]) -> None:
        """Make the staged rows of shards, ledger entries included, visible in one commit.

        The rows that the shards in `replaced` had before give way to them; a shard not named there must have none.
        """
        import pyarrow as pa

        staged = Staged.together(each for _, each in shards)
        with self.lock():
            fragments = list(staged.fragments)
            if staged.tables:
                fragments += self._write_fragments(pa.concat_tables(staged.tables).combine_chunks())
            self._commit(of_shards(replaced), fragments)

    def restamp(self, records: Collection[ShardRecord]) -> None:
        """Put these entries into the ledger in place of those of the same shards, and leave their rows alone."""
        if records:
            with self.lock():
                table = arrow_table([ledger_row(record) for record in records], self._dataset.schema)
                self._commit(f"kind = 'shard' AND {of_shards(records)}", self._write_fragments(table))

    def drop_shards(self, records: Collection[ShardRecord]) -> None:
        """Take out all rows of these shards. Unlike `remove`, a later build may bring them back."""
        if records:
            with self.lock():
                self._commit(of_shards(records), [])

    def add(self, pairs: Sequence[StoredPair]) -> None:
        """Add pairs outside any shard, visible at once. An old row of the same id, removed ones too, gives way."""
        if pairs:
            with self.lock():
                table = arrow_table([pair_row(p) for p in pairs], self._dataset.schema)
                self._commit([p.id for p in pairs], self._write_fragments(table))
                self._removed = None

    def remove(
        self, ids: Collection[int] | None = None, *, where: str | None = None, same_image: bool = False
    ) -> list[int]:
        """Take pairs down, by ids or by an SQL filter, at once; the ids that were there. No build brings them back.

        `same_image` takes every pair that shows the very image of one of them, too, and whatever comes from where
        such an image lies; and no build brings either in again: not under another key, in another shard or dataset.
        """
        if (ids is None) == (where is None):
            raise QueryError("say which pairs to remove, either by ids or by a filter")
        with self.lock():
            condition = where if where is not None else id_in([int(i) for i in ids or ()])
            with filter_errors(where):
                rows = graves(self._dataset, condition, same_image=same_image)
            gone = [int(row["id"]) for row in rows]
            if gone:
                self._commit(gone, self._write_fragments(arrow_table(rows, self._dataset.schema)))
                self._removed = None
        return gone

    def add_missing_columns(self) -> None:
        """Give a table of an older format the columns that came later, empty: one commit that moves no data."""
        import pyarrow as pa

        with self.lock(), one_sentence(self.directory):
            known = set(self._dataset.schema.names)
            missing = [column for column in table_schema(self.dim) if column.name not in known]
            if missing:
                self._dataset.add_columns(pa.schema(missing))
                self.refresh()

    def index_ids(self, *, min_rows: int = INDEX_ROWS) -> None:
        """Index ids and kinds, so that fetching a few of very many pairs stays a matter of milliseconds.

        Nothing is done in a small store, which is scanned as fast, nor when the indices cover every row.
        """
        with self.lock(), one_sentence(self.directory):
            if self._dataset.count_rows() < min_rows:
                return
            covered = {description.name for description in self._dataset.describe_indices()}
            for column, kind in (("id", "BTREE"), ("kind", "BITMAP")):
                name = f"{column}_idx"
                if name not in covered:
                    self._dataset.create_scalar_index(column, kind, name=name)
                elif self._dataset.stats.index_stats(name)["num_unindexed_rows"]:
                    self._dataset.optimize.optimize_indices(index_names=[name])  # the new rows alone are sorted
                self.refresh()

    # Compaction, see `index/compaction.py`

    def count_fragments(self) -> int:
        """Files of rows, roughly: a scan opens each."""
        return len(self._dataset.get_fragments())

    def rewrite_fragments(self) -> "Rewrite | None":
        """Write small and partly deleted fragments anew, merged, not yet visible; None when there are none."""
        from lance.optimize import Compaction

        with self.lock(), one_sentence(self.directory):
            options = {
                "target_rows_per_fragment": FRAGMENT_ROWS,
                "materialize_deletions_threshold": 0.0,  # one deleted row is enough: it must be purged
                "batch_size": self._rows_at_once(),
            }
            tasks = Compaction.plan(self._dataset, options).tasks
            results = [task.execute(self._dataset) for task in tasks]
        paths = [file.path for result in results for fragment in result.new_fragments for file in fragment.files]
        return Rewrite(results=results, files=tuple(paths)) if results else None

    def commit_rewrite(self, rewrite: "Rewrite") -> None:
        """Let what `rewrite_fragments` wrote take the place of what it read, indices included."""
        from lance.optimize import Compaction

        with self.lock(), one_sentence(self.directory):
            Compaction.commit(self._dataset, rewrite.results)
            self.refresh()

    def forget_versions(self) -> int:
        """Delete all earlier versions that no tag holds, and files of commits that never were; how many versions."""
        with self.lock(), one_sentence(self.directory):
            cleaned = self._dataset.cleanup_old_versions(
                older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
            )
        return int(cleaned.old_versions)

    # Inside

    def _tag(self, name: str) -> str:
        """The tag of a snapshot by its name, or by the number that queries and `stats` tell."""
        tags = self._dataset.tags.list()
        numbers = {tag: str(about["version"]) for tag, about in tags.items()}
        for tag, number in numbers.items():
            if name in (tag, number):
                return tag
        newest = sorted(numbers.items(), key=lambda item: -int(item[1]))
        listed = ", ".join(f"{tag} (number {number})" for tag, number in newest[:_TAGS_NAMED])
        more = ", ..., see `radt index stats`" if len(newest) > _TAGS_NAMED else ""
        there = f"it has {listed}{more}" if newest else "it has none: every build that changes something leaves one"
        present = "; the present state needs no name" if name == str(self.version) else ""
        raise KnowledgeBaseError(f"{self.root} has no snapshot {name!r}: {there}{present}")

    def _named(self, ids: Sequence[int], columns: Sequence[str]) -> "pa.Table":
        """These columns of those of the pairs that are there, in stored order, without columns of a later format."""
        columns = self.known(columns)
        rows = self.row_map(len(ids))
        if rows is not None:
            return rows.read(np.array(possible_ids(ids), dtype=np.int64), columns)
        return self._dataset.to_table(columns=columns, filter=self._pairs_where(id_in(ids)))

    def _rows_at_once(self) -> int:
        """So many rows that a batch of them, kept images included, is some ten megabytes."""
        rows = max(self._dataset.count_rows(), 1)
        row_bytes = sum(file.stat().st_size for file in Path(self._uri, "data").glob("*")) // rows
        return int(np.clip(BATCH_BYTES // max(row_bytes, 1), 16, 8192))

    def _fragments_after(self, high_water: int) -> list[Any]:
        newer = [f for f in self._dataset.get_fragments() if f.fragment_id > high_water]
        return [f for f in newer if not any(file.path in self.moved_files for file in f.data_files())]

    def _pairs_where(self, where: str | None) -> str:
        return str(self.shown_where(f"kind = 'pair' AND ({where})" if where else "kind = 'pair'"))

    def _hidden(self) -> frozenset[int]:
        """Pairs of this snapshot that have been taken down since: they must not come back through the past."""
        import lance

        latest = lance.dataset(self._uri)
        removed = latest.to_table(columns=["id"], filter="kind = 'removed'").column("id").to_pylist()
        there = self._dataset.to_table(columns=["id"], filter=f"kind = 'pair' AND {id_in(removed)}")
        return frozenset(there.column("id").to_pylist())

    def _write_fragments(self, table: "pa.Table") -> list[Any]:
        import lance

        with one_sentence(self.directory):
            return list(lance.fragment.write_fragments(table, self._uri, schema=self._dataset.schema, mode="append"))

    def _commit(self, obsolete: str | Sequence[int] | None, fragments: Sequence[Any]) -> None:
        """One commit that deletes the rows matching `obsolete`, or of these ids, and appends `fragments`."""
        import lance

        with one_sentence(self.directory):
            emptied, trimmed = self._delete_from_fragments(obsolete) if obsolete else ([], [])
            operation: Any
            if emptied or trimmed or not fragments:
                operation = lance.LanceOperation.Update(
                    removed_fragment_ids=emptied, updated_fragments=trimmed, new_fragments=list(fragments)
                )
            else:
                operation = lance.LanceOperation.Append(list(fragments))
            transaction = lance.Transaction(self._dataset.version, operation)
            self._dataset = lance.LanceDataset.commit(self._dataset, transaction)

    def _delete_from_fragments(self, obsolete: str | Sequence[int]) -> tuple[list[int], list[Any]]:
        """Fragment ids left empty, and the new metadata of those left with fewer rows; nothing is visible yet."""
        where = obsolete if isinstance(obsolete, str) else id_in(obsolete)
        rows = self._dataset.scanner(columns=["id"], filter=where, with_row_address=True).to_table()
        fragment_of = rows.column("_rowaddr").to_numpy() >> np.uint64(32)
        emptied: list[int] = []
        trimmed: list[Any] = []
        for fragment_id in np.unique(fragment_of).tolist():
            if not isinstance(obsolete, str):  # every fragment reads the text anew: it gets no ids but its own
                where = id_in(rows.column("id").to_numpy()[fragment_of == fragment_id].tolist())
            rest = self._dataset.get_fragment(fragment_id).delete(where)
            if rest is None:
                emptied.append(fragment_id)
            else:
                trimmed.append(rest)
        return emptied, trimmed

    def _taken_down(self) -> Removed:
        removed = self._removed  # another thread may take the lock, and forget them, at any moment
        if removed is None or self._lock_file is None:  # only who holds the lock knows that none is added
            removed = self._removed = Removed.read(self._dataset)
        return removed

    def _arrays(self, batches: Iterable[Any]) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
        ids, vectors = [np.empty(0, np.int64)], [np.empty((0, self.dim), np.float32)]
        for batch in batches:
            ids.append(batch.column("id").to_numpy())
            vectors.append(batch.column("vector").flatten().to_numpy().reshape(-1, self.dim))
        return np.concatenate(ids), np.concatenate(vectors)
