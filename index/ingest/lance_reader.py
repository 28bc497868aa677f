"""Lance tables of captioned images, by themselves (`X.lance`) or in a LanceDB folder. A shard is one fragment."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from posixpath import basename, dirname, join
from typing import Any

import numpy as np

from index.embedder import unit_rows
from index.errors import CorpusError
from index.ingest.columns import Columns, Rows, find_columns, row_samples
from index.ingest.parquet_reader import as_rows
from index.ingest.shards import Info, Listing, Sample, Shard, SkippedShard, uri_of

BATCH_ROWS = 64
BATCH_BYTES = 64 << 20  # of rows in memory at once
INSIDE = re.compile(r"^(.*?\.lance)/(?:data|_versions|_deletions|_transactions|_indices|_latest\.manifest)(?:/|$)")
KNOWLEDGE_BASE = "kb.json"
FAILURE = re.compile(r"max_retries: |error sending request|os error (?:5|12|13|23|24)\b")  # may pass: it is no damage


def find_lance(listing: Listing) -> Iterator[Shard | SkippedShard]:
    """The fragments of every table, as its latest version has them."""
    inside: dict[str, list[str]] = {}
    for path in listing.left:
        if match := INSIDE.match(path):
            inside.setdefault(match[1], []).append(path)
    for table, paths in sorted(inside.items()):
        files = listing.take(paths)
        if listing.fs.exists(join(dirname(table), KNOWLEDGE_BASE)):
            yield listing.skipped(table, "it is a knowledge base; search several at once with --kb A --kb B")
            continue
        try:
            with _one_sentence(basename(table)):
                fragments = list(_fragments(listing, table, files))
            yield from fragments
        except CorpusError as error:
            yield listing.skipped(table, str(error))


def _fragments(listing: Listing, path: str, files: dict[str, Info]) -> Iterator[Shard]:
    dataset = _open(listing.fs, path, None)
    find_columns(dataset.schema, basename(path), with_vectors=True)
    first = 0
    for fragment in dataset.get_fragments():
        names = [join("data", file.path) for file in fragment.data_files()] + [fragment.deletion_file() or ""]
        own = {file: files[file] for file in (join(path, name) for name in names) if file in files}
        contents = LanceContents(path, dataset.version, fragment.fragment_id, first)
        shard = listing.shard(f"{path}#{fragment.fragment_id}", "lance table", own, contents)
        yield replace(shard, mark=f"row {first}")  # an image's location counts rows from the table's beginning
        first += fragment.count_rows()


@dataclass(frozen=True, slots=True)
class LanceContents:
    """One fragment of one version of a table."""

    path: str
    version: int
    fragment: int
    first: int  # number of its first row in the table

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """Its rows, with their vectors where there are some."""
        with _one_sentence(basename(self.path)):
            dataset = _open(shard.fs, self.path, self.version)
            columns = find_columns(dataset.schema, basename(self.path), with_vectors=True)
        first = self.first
        for batch in self._batches(dataset, columns):
            rows = as_rows(batch.select(columns.scalars))
            some = Rows(rows=rows, first=first, vectors=_vectors(batch, columns.vector))
            yield from row_samples(shard, self.path, columns, some)
            first += batch.num_rows

    def _batches(self, dataset: Any, columns: Columns) -> Iterator[Any]:
        with _one_sentence(f"fragment {self.fragment} of {basename(self.path)}"):
            scanner = dataset.scanner(
                columns=[*columns.scalars, *([columns.vector] if columns.vector else [])],
                fragments=[dataset.get_fragment(self.fragment)],
                batch_size=BATCH_ROWS,
                batch_size_bytes=BATCH_BYTES,
                io_buffer_size=4 * BATCH_BYTES,
                batch_readahead=2,
                scan_in_order=True,
                blob_handling="all_binary",
            )
            yield from scanner.to_batches()


def _open(fs: Any, path: str, version: int | None) -> Any:
    import lance

    return lance.dataset(uri_of(fs, path), version=version)


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Lance raises whatever its Rust code met, even a panic, which is no Exception. OSError when storage has failed."""
    try:
        yield
    except CorpusError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        if FAILURE.search(str(error)):
            raise OSError(f"{what}: {reason}") from error
        raise CorpusError(f"{what} cannot be read ({reason})") from error


def _vectors(batch: Any, column: str | None) -> list[np.ndarray | None]:
    """The vectors of a batch, None for those that are null."""
    if column is None:
        return [None] * batch.num_rows
    rows = batch.column(column).to_pylist()
    return [None if row is None else unit_rows(np.array([row], np.float64))[0] for row in rows]
