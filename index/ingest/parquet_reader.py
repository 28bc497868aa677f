"""Parquet files with images in them, as img2dataset and Hugging Face write them, or with the paths of images."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from posixpath import basename
from typing import Any

from index.errors import CorpusError
from index.ingest.columns import Columns, Rows, find_columns, row_samples
from index.ingest.shards import Layout, Listing, Sample, Shard, SkippedShard, beside, is_storage_error, open_anywhere

BATCH_ROWS = 64
BATCH_BYTES = 256 << 20  # of rows in memory at once
LOOKED_AT = 64  # files of a folder whose columns are looked at; the others are taken to be like the first
IMG2DATASET_NAME = re.compile(r"^\d+\.parquet$")


def find_parquet(listing: Listing) -> Iterator[Shard | SkippedShard]:
    """Every Parquet file that is left is a shard, unless there is nothing in it to be read."""
    for paths in listing.folders().values():
        first: Layout | None = None
        for number, path in enumerate(p for p in paths if p.endswith(".parquet")):
            files = listing.take([path, beside(path, "_stats.json")])
            try:
                layout = first if first and number >= LOOKED_AT else _layout(listing.fs, path)
            except CorpusError as error:
                yield listing.skipped(path, str(error))
                continue
            first = first or layout
            yield listing.shard(path, layout, files, ParquetContents(path))


def _layout(fs: Any, path: str) -> Layout:
    """What the columns say. A file that cannot be opened is a shard all the same, and its samples say why."""
    try:
        with open_table(fs, path) as table:
            schema = table.schema_arrow
    except DamagedTableError:
        return "parquet of images"
    columns = find_columns(schema, basename(path))
    if columns.image is None:
        return "parquet of paths"
    is_img2dataset = IMG2DATASET_NAME.match(basename(path)) and {"key", "status"} <= set(schema.names)
    return "img2dataset parquet" if is_img2dataset else "parquet of images"


@dataclass(frozen=True, slots=True)
class ParquetContents:
    """One Parquet file."""

    path: str

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """Its rows in their order, a few at a time; a row group that is damaged is one BadSample."""
        with open_table(shard.fs, self.path) as table:
            columns = find_columns(table.schema_arrow, basename(self.path))
            for rows in table_rows(table, columns):
                if isinstance(rows, DamagedTableError):
                    yield shard.bad("", None, str(rows))
                else:
                    yield from row_samples(shard, self.path, columns, rows)


# Tables


class DamagedTableError(CorpusError):
    """A Parquet file, or a row group of it, that cannot be read."""


@contextmanager
def open_table(fs: Any, path: str) -> Iterator[Any]:
    """The file as a pyarrow ParquetFile. DamagedTableError when it is none."""
    import pyarrow.parquet

    with open_anywhere(fs, path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        except Exception as error:
            raise damaged(f"{basename(path)} is damaged or not a Parquet file", error) from error
        yield table


def table_rows(table: Any, columns: Columns) -> Iterator[Rows | DamagedTableError]:
    """These columns of a ParquetFile, a few rows at a time; after a damaged row group comes the next."""
    first = 0
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        at = first
        try:
            batches = table.iter_batches(
                _batch_rows(about, columns), row_groups=[group], columns=columns.scalars, use_threads=False
            )
            for batch in batches:
                yield Rows(rows=as_rows(batch), first=at, vectors=[None] * batch.num_rows)
                at += batch.num_rows
            if at != first + about.num_rows:
                raise ValueError("they are not there")
        except Exception as error:
            yield damaged(f"row group {group} is damaged: rows {at} to {first + about.num_rows - 1} are lost", error)
        first += about.num_rows
    if first != table.metadata.num_rows:
        yield DamagedTableError(f"the file should have {table.metadata.num_rows} rows, and its row groups have {first}")


def _batch_rows(group: Any, columns: Columns) -> int:
    """How many rows of a group to hold at once: each may have the same value, as large as all that is stored.

    Nothing may be asked of the group's columns: where they are damaged, pyarrow aborts the process.
    """
    if columns.image is None:
        return BATCH_ROWS
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(group.total_byte_size, 1)))


def as_rows(batch: Any) -> list[Mapping[str, Any] | None]:
    """The rows of a record batch, None for those that hold text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_row(batch, i) for i in range(batch.num_rows)]


def _row(batch: Any, i: int) -> Mapping[str, Any] | None:
    try:
        row: Mapping[str, Any] = batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
    return row


def damaged(what: str, error: Exception) -> DamagedTableError:
    """A DamagedTableError that tells the cause in one line. What the disk or the network did wrong is raised instead.

    A decoder of a hostile file may raise anything else, and it is always the file's fault.
    """
    if isinstance(error, DamagedTableError):
        return error
    if is_storage_error(error):
        raise error
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DamagedTableError(f"{what} ({reason})")
