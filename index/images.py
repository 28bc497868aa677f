"""Images where they lie: bytes by location, each file opened once, and what is measured of a decoded image.

Nothing is copied unless asked: a location is a byte range of a tar, a whole file, or a cell of a table, local or in a
bucket. `ImageLocation` (`index/records.py`) says which; this module reads it.

A knowledge base may be anybody's, so what its rows name is read only where a build would have read it: regular files
of bounded size, on this machine, in buckets, or at the host that the row's own source lies at.
"""

import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from index.errors import ImageError
from index.ingest.columns import BUCKETS
from index.ingest.shards import MAX_IMAGE_BYTES, is_local
from index.records import ImageLocation, StoredPair

if TYPE_CHECKING:
    import PIL.Image

CELL = re.compile(r"^(?P<path>.+\.(?P<kind>parquet|lance))#(?P<column>.+)/(?P<row>\d+|id=-?\d+)$", re.DOTALL)
REMOTE_FILES = 16  # files in buckets that are read at once
OPEN_TABLES = 8
SCHEMES = {*BUCKETS, "local", "memory"}  # read whoever names them; others where the source is
BATCH_CELLS = 256  # cells of a parquet file in memory at once: a row group may hold gigabytes of images

Outcome = bytes | ImageError


def read_images(locations: Sequence[ImageLocation]) -> list[bytes]:
    """The encoded images, in the order of `locations`. ImageError, naming the first that cannot be read."""
    outcomes = try_read_images(locations)
    for outcome in outcomes:
        if isinstance(outcome, ImageError):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, bytes)]


def try_read_images(
    locations: Sequence[ImageLocation], *, digests: Sequence[str | None] | None = None
) -> list[Outcome]:
    """For each location the encoded image, or why it cannot be had.

    `digests` are the images' SHA-256 as they were read in, None where unknown: what has other bytes now is an error.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    outcomes: dict[int, Outcome] = {}
    for i, location in enumerate(locations):
        if reason := _why_not_read(location):
            outcomes[i] = _error(location, reason)
        else:
            groups.setdefault(_place(location.uri), []).append(i)

    def read_group(place: tuple[str, str]) -> list[Outcome]:
        return _read_group(place, [locations[i] for i in groups[place]])

    is_slow = len(groups) > 1 and any("://" in path for _, path in groups)
    with ThreadPoolExecutor(REMOTE_FILES if is_slow else 1) as threads:
        read = threads.map(read_group, groups) if is_slow else map(read_group, groups)
        for group, found in zip(groups.values(), read, strict=True):
            outcomes.update(zip(group, found, strict=True))
    return [
        _unchanged(outcomes[i], location, digests[i] if digests is not None else None)
        for i, location in enumerate(locations)
    ]


def readable_image(pair: StoredPair) -> bytes:
    """The encoded image, or its thumbnail where the original is gone or has changed. ImageError without either.

    The pair must have been fetched with `thumbnails=True` for a thumbnail to be found.
    """
    (outcome,) = try_read_images([pair.image], digests=[pair.sha256])
    if isinstance(outcome, bytes):
        return outcome
    if pair.thumbnail is None:
        raise outcome
    return pair.thumbnail


# What is measured of an image


def difference_hash(image: "PIL.Image.Image") -> int:
    """64 bits that near-duplicates share, signed: whether each of 9 by 8 grey pixels is darker than the next.

    Rows from the top, the first comparison in the highest bit. Images of one colour have 0.
    """
    import PIL.Image

    grey = np.asarray(image.convert("L").resize((9, 8), PIL.Image.Resampling.BOX))
    bits = np.packbits(grey[:, :-1] < grey[:, 1:])
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def thumbnail_of(image: "PIL.Image.Image", pixels: int) -> bytes:
    """A JPEG whose longer side has at most `pixels`."""
    small = image.copy()
    small.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


# Reading


def _why_not_read(location: ImageLocation) -> str | None:
    """Why this is not even tried; None when it is."""
    if min(location.offset or 0, location.size or 0) < 0 or (location.size or 0) > MAX_IMAGE_BYTES:
        return f"no image lies at byte {location.offset or 0} with {location.size} bytes"
    if "://" not in location.uri:
        return None
    if "::" in location.uri:
        return "it is an address inside another, and those are not followed"
    place = _host(location.uri)
    if place[0] in SCHEMES or place == _host(location.origin):
        return None
    return f"nothing is read from {place[0]}://{place[1]}, which is not where its source lies"


def _host(uri: str) -> tuple[str, str]:
    """Scheme and host of a URL."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # no address at all
        return uri.partition("://")[0], ""
    return parts.scheme, parts.netloc


def _place(uri: str) -> tuple[str, str]:
    """How to read it, and the file that has to be opened."""
    cell = CELL.match(uri)
    if cell:
        return cell["kind"], cell["path"]
    return "file" if uri else "none", uri


def _read_group(place: tuple[str, str], locations: Sequence[ImageLocation]) -> list[Outcome]:
    """All that lie in one file. What goes wrong with the file goes wrong for each of them."""
    kind, path = place
    readers: dict[str, Callable[[str, Sequence[ImageLocation]], list[Outcome]]] = {
        "file": _read_ranges,
        "parquet": _read_parquet,
        "lance": _read_lance,
        "none": lambda _, all_of_them: [_error(location, "only its vector is known") for location in all_of_them],
    }
    try:
        return readers[kind](path, locations)
    except Exception as error:  # a storage client raises its own kinds, and each of them means "not readable"
        return [_error(location, error) for location in locations]


def _read_ranges(uri: str, locations: Sequence[ImageLocation]) -> list[Outcome]:
    """Byte ranges of a file, or all of it."""
    fs, path = _opened(uri)
    if fs is not None:
        return _read_remote(fs, path, locations)
    outcomes: dict[int, Outcome] = {}
    with open(path, "rb") as file:
        for i, location in sorted(enumerate(locations), key=lambda item: item[1].offset or 0):
            file.seek(location.offset or 0)
            is_all = location.offset is None or location.size is None
            outcomes[i] = _whole(file.read(MAX_IMAGE_BYTES + 1 if is_all else location.size), location)
    return [outcomes[i] for i in range(len(locations))]


def _opened(uri: str) -> tuple[Any, str]:
    """The file system, None for that of this machine, and the path in it. OSError for what is no regular file here."""
    fs, path = None, uri
    if "://" in uri:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(uri)
        fs = None if is_local(fs) else fs
    if fs is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, a device never ends
        raise OSError("it is not a regular file")
    return fs, path


def _read_remote(fs: Any, path: str, locations: Sequence[ImageLocation]) -> list[Outcome]:
    """A bucket answers many ranges at once."""
    starts = [at.offset or 0 for at in locations]
    sizes = [MAX_IMAGE_BYTES + 1 if at.offset is None or at.size is None else at.size for at in locations]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    contents = fs.cat_ranges([path] * len(locations), starts, ends, on_error="return")
    return [
        _error(location, content) if isinstance(content, Exception) else _whole(bytes(content), location)
        for content, location in zip(contents, locations, strict=True)
    ]


def _read_parquet(path: str, locations: Sequence[ImageLocation]) -> list[Outcome]:
    import pyarrow.parquet
    from fsspec.core import url_to_fs

    _opened(path)
    fs, file_path = url_to_fs(path)
    wanted: dict[str, list[int]] = {}
    for location in locations:
        column, row = _column_and_row(location)
        wanted.setdefault(column, []).append(row)
    info = fs.info(file_path)
    metadata = _parquet_metadata(path, str((info["size"], info.get("mtime"), info.get("ETag"))))
    cells: dict[tuple[str, int], Any] = {}
    with fs.open(file_path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file, metadata=metadata)
        for column, rows in wanted.items():
            cells.update(((column, row), value) for row, value in _parquet_cells(table, column, rows))
    return [_cell_bytes(cells.get(_column_and_row(location)), location) for location in locations]


@lru_cache(OPEN_TABLES)
def _parquet_metadata(path: str, state: str) -> Any:
    """The footer of a file; `state` (size and time) makes it read anew once the file has changed."""
    import pyarrow.parquet
    from fsspec.core import url_to_fs

    fs, file_path = url_to_fs(path)
    with fs.open(file_path, "rb") as file:
        return pyarrow.parquet.read_metadata(file)


def _parquet_cells(table: Any, column: str, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(row, value) of those rows that the file has; of a row group nothing is read behind the last one wanted."""
    groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(groups)])
    for group, (start, end) in enumerate(pairwise(starts.tolist())):
        inside = sorted({row for row in rows if start <= row < end})
        at = start
        for batch in table.iter_batches(BATCH_CELLS, row_groups=[group], columns=[column]) if inside else ():
            values = _leaf(batch.column(0), column, batch.schema.names)
            yield from ((row, values[row - at].as_py()) for row in inside if at <= row < at + len(values))
            at += len(values)
            if at > inside[-1]:
                break


def _leaf(values: Any, column: str, names: Sequence[str]) -> Any:
    """`image.bytes` is the field `bytes` of the column `image`, unless a column has that very name."""
    if column not in names:
        for name in column.split(".")[1:]:
            values = values.field(name)
    return values


def _read_lance(path: str, locations: Sequence[ImageLocation]) -> list[Outcome]:
    """Cells by row offset, or by pair id in the table of a knowledge base."""
    import lance

    dataset = _lance_dataset(path)
    if dataset.latest_version != dataset.version:  # older ones may be cleaned up at any time
        _lance_dataset.cache_clear()
        dataset = lance.dataset(path)
    outcomes: list[tuple[ImageLocation, Any]] = []
    for column in dict.fromkeys(_column_and_row(location)[0] for location in locations):
        of_column = [location for location in locations if _column_and_row(location)[0] == column]
        outcomes += zip(of_column, _lance_cells(dataset, column, of_column), strict=True)
    by_location = {location: _cell_bytes(value, location) for location, value in outcomes}
    return [by_location[location] for location in locations]


@lru_cache(OPEN_TABLES)
def _lance_dataset(path: str) -> Any:
    import lance

    return lance.dataset(path)


def _lance_cells(dataset: Any, column: str, locations: Sequence[ImageLocation]) -> list[Any]:
    rows = [location.uri.rpartition("/")[2] for location in locations]
    if rows[0].startswith("id="):
        ids = ", ".join(dict.fromkeys(row[3:] for row in rows))
        table = dataset.to_table(columns=["id", column], filter=f"kind = 'pair' AND id IN ({ids})")
        found = dict(zip(table.column("id").to_pylist(), table.column(column).to_pylist(), strict=True))
        return [found.get(int(row[3:])) for row in rows]
    numbers = [int(row) for row in rows]
    count = dataset.count_rows()
    inside = [number for number in numbers if number < count]
    found = dict(zip(inside, _lance_rows(dataset, column, inside), strict=True))
    return [found.get(number) for number in numbers]


def _lance_rows(dataset: Any, column: str, rows: Sequence[int]) -> list[Any]:
    """Cells by row offset. Of a blob, `take` tells only where it lies."""
    if not rows:
        return []
    names = dataset.schema.names
    field = dataset.schema.field(column if column in names else column.partition(".")[0])
    if getattr(field.type, "extension_name", "") == "lance.blob.v2" or b"lance-encoding:blob" in (field.metadata or {}):
        return [blob and blob.read() for blob in dataset.take_blobs(column, indices=list(rows))]
    values = dataset.take(list(rows), columns=[column]).column(0).combine_chunks()
    return list(_leaf(values, column, names).to_pylist())


def _column_and_row(location: ImageLocation) -> tuple[str, int]:
    cell = CELL.match(location.uri)
    assert cell is not None, location.uri
    return cell["column"], int(cell["row"].removeprefix("id="))


def _whole(content: bytes, location: ImageLocation) -> Outcome:
    if len(content) > MAX_IMAGE_BYTES:
        return _error(location, f"it is larger than {MAX_IMAGE_BYTES} bytes")
    if location.size is not None and len(content) != location.size:
        return _error(location, "it has not the size that it had when it was read in")
    return content


def _cell_bytes(value: Any, location: ImageLocation) -> Outcome:
    if not isinstance(value, bytes) or not value:
        return _error(location, "there are no bytes in this cell")
    return _whole(value, location)


def _unchanged(outcome: Outcome, location: ImageLocation, digest: str | None) -> Outcome:
    if isinstance(outcome, bytes) and digest is not None and sha256(outcome).hexdigest() != digest:
        return _error(location, "it is not the image that was read in: the file has changed since")
    return outcome


def _error(location: ImageLocation, cause: str | BaseException) -> ImageError:
    if isinstance(cause, FileNotFoundError):
        cause = "there is no such file"
    elif isinstance(cause, OSError) and cause.strerror:
        cause = cause.strerror
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    at = "" if location.offset is None else f", byte {location.offset}"
    return ImageError(f"cannot read the image at {location.uri!r}{at} ({reason}); put it back, or build again")
