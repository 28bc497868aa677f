"""Folders of images, with captions in `.txt` or `.json` files beside them or in a `metadata.jsonl` / `metadata.csv`.

img2dataset's `files` output is one of these: a numbered folder for each shard.
"""

import codecs
import csv
import json
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from posixpath import basename, dirname, join, relpath, splitext
from typing import Any

from index.errors import CorpusError
from index.ingest.samples import MAX_TEXT_BYTES, BadMetadata, make_sample, parse_json, parse_metadata
from index.ingest.shards import (
    IMAGE_SUFFIXES,
    READ_TOGETHER,
    Info,
    Listing,
    Sample,
    Shard,
    change_mark,
    open_ahead,
    read_files,
    suffix_of,
    uri_of,
)
from index.ingest.tar_reader import IMG2DATASET_MARK, ShardTable
from index.records import ImageLocation

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
HELD_BYTES = 64 << 20  # of images in memory at once
MAX_METADATA_BYTES = 1 << 30  # of a metadata file, whose rows may be in any order; so many are held in memory
ROW_BYTES = 200  # that a row takes besides its text
SIDECARS = (".txt", ".json")

MetadataRows = Mapping[str, bytes] | CorpusError


def find_img2dataset_folders(listing: Listing) -> Iterator[Shard]:
    """The numbered folders of a folder that has img2dataset's stats or tables in it."""
    folders = listing.folders()
    marked = {folder for folder, paths in folders.items() if any(IMG2DATASET_MARK.match(basename(p)) for p in paths)}
    for folder, paths in folders.items():
        if dirname(folder) in marked and basename(folder).isdigit() and any(map(_is_image, paths)):
            table = folder + ".parquet"
            files = listing.take([*paths, table, folder + "_stats.json"])
            contents = FolderContents(folder, (), table if table in files else None)
            yield listing.shard(folder, "img2dataset files", files, contents)


def find_folders(listing: Listing, *, only_captioned: bool) -> Iterator[Shard]:
    """Every folder that has images; with `only_captioned`, images that no file gives captions are somebody else's."""
    for folder, paths in listing.folders().items():
        if not any(map(_is_image, paths)):
            continue
        above = tuple(path for path in _metadata_above(folder, listing.root) if path in listing.files)
        if only_captioned and not above and not _has_sidecars(paths):
            continue
        files = listing.take(path for path in paths if basename(path) not in METADATA_NAMES)
        files |= {path: listing.files[path] for path in above}  # their change must be noticed
        yield listing.shard(folder, "image folders", files, FolderContents(folder, above))


@dataclass(frozen=True, slots=True)
class FolderContents:
    """The images of one folder, and the metadata files that may name them, the nearest first."""

    folder: str
    metadata: tuple[str, ...]
    table: str | None = None  # img2dataset's

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """img2dataset names a sample by its number; in a free folder the whole file name is the key."""
        rows = _MetadataRows(shard, self.metadata)
        table = ShardTable(shard, self.table)
        yield from (shard.bad("", None, complaint) for complaint in rows.complaints)
        images = sorted(path for path in shard.files if _is_image(path) and dirname(path) == self.folder)
        for some in _portions(images, shard.files):
            wanted = [path for image in some for path in _own_files(image, shard.files)]
            contents = dict(zip(wanted, read_files(shard.fs, wanted), strict=True))
            for image in some:
                key = basename(splitext(image)[0] if shard.is_img2dataset else image)
                files = {path: contents[path] for path in _own_files(image, shard.files)}
                has_json = splitext(image)[0] + ".json" in files
                yield _sample(shard, key, files, rows.row(image) or ({} if has_json else table.row(key)))
        if table.complaint:
            yield shard.bad("", None, table.complaint)


def _sample(shard: Shard, key: str, files: Mapping[str, bytes | OSError], row: Mapping[str, Any]) -> Sample:
    """A sample of the content of its files, the image first."""
    problem = next(filter(None, (_problem(path, content) for path, content in files.items())), "")
    if problem:
        return shard.bad(key, None, problem)
    parts = {suffix_of(path): content for path, content in files.items() if isinstance(content, bytes)}
    metadata = parse_metadata(parts["json"]) if "json" in parts else {}
    if not isinstance(metadata, BadMetadata):
        metadata = {**row, **metadata}
    image = next(iter(files))
    location = ImageLocation(uri=uri_of(shard.fs, image))
    encoded = parts[suffix_of(image)]
    return make_sample(shard, key, text=parts.get("txt"), metadata=metadata, image=location, encoded=encoded)


class _MetadataRows:
    """The rows of the metadata files at and above a folder, the nearest first."""

    def __init__(self, shard: Shard, paths: tuple[str, ...]):
        self.complaints: list[str] = []  # why a file of them cannot be read
        self._tables: list[tuple[str, Mapping[str, bytes]]] = []
        for path in paths:
            rows = _held_rows(shard.fs, path, change_mark(shard.files[path]))
            if isinstance(rows, CorpusError):
                self.complaints.append(str(rows))
            else:
                self._tables.append((dirname(path), rows))

    def row(self, image: str) -> Mapping[str, Any]:
        """The image's row in the first file that has one, by `file_name` relative to that file; or nothing."""
        found = (rows.get(relpath(image, folder)) for folder, rows in self._tables)
        row = next((row for row in found if row is not None), None)
        if row is None:
            return {}
        values = parse_json(row.decode("utf-8-sig", "replace"))
        return {name: value for name, value in values.items() if name != "file_name"}


def _is_image(path: str) -> bool:
    return suffix_of(path) in IMAGE_SUFFIXES


def _own_files(image: str, files: Mapping[str, Info]) -> list[str]:
    stem = splitext(image)[0]
    return [image, *(path for path in (stem + ending for ending in SIDECARS) if path in files)]


def _has_sidecars(paths: list[str]) -> bool:
    names = set(paths)
    return any(splitext(path)[0] + ending in names for path in paths if _is_image(path) for ending in SIDECARS)


def _metadata_above(folder: str, root: str) -> Iterator[str]:
    while True:
        yield from (join(folder, name) for name in METADATA_NAMES)
        if folder == root or dirname(folder) == folder:
            return
        folder = dirname(folder)


def _portions(images: list[str], files: Mapping[str, Info]) -> Iterator[list[str]]:
    """The images in portions that can be held in memory."""
    portion: list[str] = []
    held = 0
    for image in images:
        portion.append(image)
        held += int(files[image]["size"] or 0)
        if len(portion) == READ_TOGETHER or held > HELD_BYTES:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion


def _problem(path: str, content: bytes | OSError) -> str:
    """What is wrong with a file that has just been read, or nothing."""
    kind = suffix_of(path) if suffix_of(path) in {"txt", "json"} else "image"
    if isinstance(content, bytes):
        is_too_long = kind != "image" and len(content) > MAX_TEXT_BYTES
        return f"the {kind} file is larger than {MAX_TEXT_BYTES} bytes" if is_too_long else ""
    if isinstance(content, PermissionError):
        raise content  # to be mended, not to be remembered
    return f"the {kind} file cannot be read: {content}"


# Metadata files


class _Recent:
    """What was read last, as many as are `limit` bytes together; and the very last, whatever it takes."""

    def __init__(self, limit: int):
        self._limit = limit
        self._held: dict[Hashable, tuple[MetadataRows, int]] = {}  # and its bytes; the oldest first
        self._mutex = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], MetadataRows]) -> MetadataRows:
        """What `read` gave for this key, if it is still held; or gives now."""
        with self._mutex:
            rows, size = self._held.pop(key) if key in self._held else _with_size(read())
            self._held[key] = rows, size
            while len(self._held) > 1 and sum(each for _, each in self._held.values()) > self._limit:
                del self._held[next(iter(self._held))]
        return rows


def _with_size(rows: MetadataRows) -> tuple[MetadataRows, int]:
    if isinstance(rows, CorpusError):
        return rows, 0
    return rows, sum(len(name) + len(row) + ROW_BYTES for name, row in rows.items())


_recent = _Recent(MAX_METADATA_BYTES)


def _held_rows(fs: Any, path: str, mark: str) -> MetadataRows:
    """`_metadata_rows`, held as long as it is of use: several folders share a file above them.

    `mark` is only there so that a changed file is read again.
    """
    return _recent.get((fs, path, mark), lambda: _metadata_rows(fs, path))


def _metadata_rows(fs: Any, path: str) -> MetadataRows:
    """The rows, as JSON, by `file_name`, without the damaged ones; or, when there is no other, what is wrong."""
    try:
        with open_ahead(fs, path) as file:
            return _json_lines(path, file) if path.endswith(".jsonl") else _csv_rows(path, file)
    except CorpusError as error:
        return error


def _json_lines(path: str, file: Any) -> dict[str, bytes]:
    rows: dict[str, bytes] = {}
    first_bad = 0
    for number, line in enumerate(_bounded(path, file), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig", "replace"))
            rows.setdefault(str(row.pop("file_name")), line)  # the first of two is taken, as everywhere
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            first_bad = first_bad or number
    if first_bad and not rows:
        raise CorpusError(f'line {first_bad} of {path} is not an object with a "file_name"; mend or remove it')
    return rows


def _csv_rows(path: str, file: Any) -> dict[str, bytes]:
    reader = csv.DictReader(codecs.iterdecode(_bounded(path, file), "utf-8-sig", "replace"))
    rows: dict[str, bytes] = {}
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise CorpusError(f"{path} has no column file_name, which ties a row to its image; add one")
        for row in reader:
            rest = {name: value for name, value in row.items() if name not in {None, "file_name"}}
            rows.setdefault(row["file_name"], json.dumps(rest).encode())
    except csv.Error as error:
        if not rows:
            raise CorpusError(f"{path} is not a csv file ({error}); mend or remove it") from error
    return rows


def _bounded(path: str, file: Any) -> Iterator[bytes]:
    """The lines of a file, those that are too long in pieces. CorpusError when they are more than may be held."""
    held = 0
    while line := file.readline(MAX_TEXT_BYTES):
        held += len(line)
        if held > MAX_METADATA_BYTES:
            raise CorpusError(
                f"{path} is larger than {MAX_METADATA_BYTES >> 20} MiB, too much to be held in memory; put a metadata "
                "file into every folder, or the captions beside the images"
            )
        yield line
