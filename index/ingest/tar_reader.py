"""Tars, as img2dataset and WebDataset write them: the files of one sample follow each other and share a key."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from posixpath import basename
from typing import Any

from index.ingest.parquet_reader import damaged, open_table
from index.ingest.samples import MAX_TEXT_BYTES, as_json, make_sample, parse_metadata
from index.ingest.shards import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    Layout,
    Listing,
    Sample,
    Shard,
    SkippedShard,
    beside,
    open_ahead,
    uri_of,
)
from index.ingest.tar_headers import REASON, Damage, Member, tar_members
from index.records import ImageLocation, Pair

IMG2DATASET_MARK = re.compile(r"^\d+(_stats\.json|\.parquet)$")
TAR_KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$", re.DOTALL)  # as WebDataset: it ends at the name's first dot
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
LIMITS = {**dict.fromkeys(IMAGE_SUFFIXES, MAX_IMAGE_BYTES), "txt": MAX_TEXT_BYTES, "json": MAX_TEXT_BYTES}


def find_tars(listing: Listing) -> Iterator[Shard | SkippedShard]:
    """Every tar is a shard; img2dataset's stats and its table, which also lists what failed, belong to it."""
    for paths in listing.folders().values():
        is_img2dataset = any(IMG2DATASET_MARK.match(basename(path)) for path in paths)
        layout: Layout = "img2dataset tars" if is_img2dataset else "webdataset tars"
        for path in paths:
            if path.endswith(".tar"):
                table = beside(path, ".parquet")
                files = listing.take([path, table, beside(path, "_stats.json")])
                yield listing.shard(path, layout, files, TarContents(path, table if table in files else None))
            elif path.endswith(COMPRESSED):
                listing.take([path])
                yield listing.skipped(path, "an image cannot be read at its place in a compressed tar; uncompress it")
            elif path.endswith(".tfrecord"):
                listing.take([path, beside(path, ".parquet")])
                reason = "TFRecord files are not read; make tars with img2dataset --output_format webdataset"
                yield listing.skipped(path, reason)


@dataclass(frozen=True, slots=True)
class TarContents:
    """A tar, and img2dataset's table of it if there is one."""

    path: str
    table: str | None

    def samples(self, shard: Shard) -> Iterator[Sample]:
        """The samples in the order of the tar; a damaged stretch is one BadSample, and what follows it is read."""
        table = ShardTable(shard, self.table)
        group = _Group("")
        with open_ahead(shard.fs, self.path) as file:
            for member in tar_members(file):
                match = TAR_KEY.match(member.name)
                key, suffix = (match[1], match[2].lower()) if match else (group.key, "")
                if key != group.key or suffix in group.parts:
                    yield from self._close(group, shard, table)
                    group = _Group(key)
                if isinstance(member, Damage):
                    group.damage = member.offset if group.damage is None else group.damage
                elif match:
                    group.parts[suffix] = _read_part(file, member, suffix)
        yield from self._close(group, shard, table)
        if table.complaint:
            yield shard.bad("", None, table.complaint)

    def _close(self, group: "_Group", shard: Shard, table: "ShardTable") -> Iterator[Sample]:
        """The sample of a group. If its tar is damaged there, that is what is wrong with it or with what came next."""
        sample = self._sample(group, shard, table) if group.parts else None
        if isinstance(sample, Pair) or (sample and group.damage is None):
            yield sample
        if group.damage is not None:
            yield shard.bad("" if isinstance(sample, Pair) else group.key, group.damage, REASON)

    def _sample(self, group: "_Group", shard: Shard, table: "ShardTable") -> Sample:
        parts = group.parts
        suffix = next((s for s in parts if s in IMAGE_SUFFIXES), None)
        if suffix is None:
            dotted = next((s for s in parts if s.rpartition(".")[2] in IMAGE_SUFFIXES), None)
            hint = f": a key ends at the first dot of a name, which leaves {dotted!r} as the suffix" if dotted else ""
            return shard.bad(group.key, next(iter(parts.values()))[0], f"no image{hint}")
        for name in (suffix, "txt", "json"):
            if name in parts and parts[name][1] is None:
                return shard.bad(group.key, parts[name][0], f"the {name} file is larger than {LIMITS[name]} bytes")
        offset, encoded = parts[suffix]
        assert encoded is not None
        location = ImageLocation(uri=uri_of(shard.fs, self.path), offset=offset, size=len(encoded))
        text = parts["txt"][1] if "txt" in parts else None
        metadata = parse_metadata(parts["json"][1]) if "json" in parts else table.row(group.key)
        return make_sample(shard, group.key, text=text, metadata=metadata, image=location, encoded=encoded)


@dataclass(slots=True)
class _Group:
    """The files of one sample: suffix -> (offset in the tar, content, or None when not wanted or too large to hold)."""

    key: str
    parts: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)
    damage: int | None = None  # where the tar is damaged, among or after these files


def _read_part(file: Any, member: Member, suffix: str) -> tuple[int, bytes | None]:
    is_wanted = member.size <= LIMITS.get(suffix, -1)
    return member.offset, file.read(member.size) if is_wanted else None


class ShardTable:
    """img2dataset's table of a shard by key, for samples that have no json beside them; read when first asked for."""

    def __init__(self, shard: Shard, path: str | None):
        self._shard, self._path = shard, path
        self._rows: Mapping[str, Mapping[str, Any]] | None = None
        self.complaint = ""  # why it could not be read

    def row(self, key: str) -> Mapping[str, Any]:
        """The row of this key, or nothing."""
        if self._rows is None:
            self._rows = self._read()
        return self._rows.get(key, {})

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None:
            return {}
        try:
            with open_table(self._shard.fs, self._path) as table:
                rows = table.read(use_threads=False).to_pylist()
        except Exception as error:
            self.complaint = str(damaged(f"{basename(self._path)} cannot be read", error))
            return {}
        return {str(row["key"]): as_json(row) for row in rows if "key" in row}
