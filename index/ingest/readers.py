"""Read image-text pairs where they lie: tars and folders, local or in a bucket, nothing written and nothing unpacked.

`read(source)` yields shards; a shard's `samples()` yields a Pair or a BadSample for everything in it. Formats:
img2dataset (`webdataset` and `files` output), WebDataset tars, and folders of images with captions in `.txt` files
beside them or in a `metadata.jsonl` / `metadata.csv`. Next on the main path: `index/ingest/build.py`.
"""

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from posixpath import basename, dirname, join, relpath, splitext
from typing import Any, Literal

from index.errors import CorpusError, MissingExtraError
from index.records import BadSample, ImageLocation, Pair

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
WANTED_SUFFIXES = IMAGE_SUFFIXES | {"txt", "json"}
MAX_IMAGE_BYTES = 256 << 20  # an encoded image above this is not read into memory
TAR_KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")  # as WebDataset: the key ends at the first dot of the file name
IMG2DATASET_MARK = re.compile(r"^\d+(_stats\.json|\.parquet)$")

Sample = Pair | BadSample
Info = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedShard:
    """A shard that is not complete yet, and why we think so."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One unit of a build: a tar, or the images of one directory. It is stored whole or not at all."""

    dataset: str
    source: str
    name: str  # its path relative to the source
    layout: Literal["tar", "files", "folder"]
    is_img2dataset: bool
    fs: Any = field(repr=False)
    files: Mapping[str, Info] = field(repr=False)  # path -> fsspec info: all that its samples are made of
    captions: Callable[[str], Mapping[str, Any]] = field(repr=False)  # image path -> its row of a metadata file, or {}

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(int(info["size"] or 0) for info in self.files.values())

    @property
    def stamp(self) -> str:
        """A hash of names, sizes and times: equal stamps mean unchanged files, without reading them."""
        listing = [(path, info["size"], _modified(info)) for path, info in sorted(self.files.items())]
        return blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest()

    def digest(self) -> str:
        """A hash of the names and the content of its files."""
        state = blake2b(digest_size=16)
        for path in sorted(self.files):
            state.update(basename(path).encode("utf-8", "surrogateescape") + b"\0")
            with self.fs.open(path, "rb") as file:
                while block := file.read(1 << 20):
                    state.update(block)
        return state.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Everything in the shard, in stored order; each key once."""
        seen: set[str] = set()
        for sample in _tar_samples(self) if self.layout == "tar" else _file_samples(self):
            key = sample.key.encode("utf-8", "backslashreplace").decode()
            offset = sample.image.offset if isinstance(sample, Pair) else sample.offset
            if key != sample.key:
                yield self.bad(key, offset, "the file name is not UTF-8")
            elif key in seen and isinstance(sample, Pair):
                yield self.bad(key, offset, "duplicate key")
            else:
                seen.add(key)
                yield sample

    def bad(self, key: str, offset: int | None, reason: str) -> BadSample:
        """A BadSample of this shard."""
        return BadSample(shard=self.name, key=key, offset=offset, reason=reason)


def read(source: str, *, dataset: str | None = None, allow_partial: bool = False) -> Iterator[Shard | SkippedShard]:
    """The shards of a tar or of a folder and all below it, sorted by name. CorpusError when there is nothing to read.

    The dataset is named after the folder unless told. A single tar belongs to the folder that it lies in, so that it
    is the same shard whether it is named alone or found with the others.
    """
    fs, root = _locate(source)
    if fs.isfile(root):
        wanted, root = root, dirname(root)
        infos = {
            path: info
            for path, info in fs.find(root, maxdepth=1, detail=True).items()
            if not _is_hidden(basename(path))
        }
        shards = [s for s in _shards(fs, root, infos, dataset) if wanted in s.files]
    else:
        infos = {path: info for path, info in fs.find(root, detail=True).items() if not _is_hidden(relpath(path, root))}
        shards = list(_shards(fs, root, infos, dataset))
    if not shards:
        raise CorpusError(
            f"no image-text pairs in {source!r}: expected WebDataset or img2dataset tars, or a folder of images with "
            "captions in .txt files beside them or in a metadata.jsonl or metadata.csv"
        )
    for shard in sorted(shards, key=lambda s: s.name):
        reason = None if allow_partial else _why_incomplete(shard, infos)
        yield SkippedShard(name=shard.name, reason=reason) if reason else shard


# Finding shards


def check_source(source: str) -> None:
    """CorpusError or MissingExtraError when there is nothing there, or no way to get at it."""
    _locate(source)


def _locate(source: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(source)
    except ImportError as error:
        raise MissingExtraError(f"{source!r} needs another package ({error}); install it with pip") from error
    except ValueError as error:
        raise CorpusError(
            f"{source!r} is of a kind that cannot be opened ({error}); check the part before ://"
        ) from error
    root = root.rstrip("/") or "/"
    if not fs.exists(root):
        raise CorpusError(f"there is nothing at {source!r}; check the path")
    return fs, root


def _shards(fs: Any, root: str, infos: Mapping[str, Info], dataset: str | None) -> Iterator[Shard]:
    by_folder: dict[str, dict[str, Info]] = {}
    for path, info in infos.items():
        by_folder.setdefault(dirname(path), {})[path] = info
    img2dataset = {d for d, files in by_folder.items() if any(IMG2DATASET_MARK.match(basename(f)) for f in files)}
    captions = _caption_lookup(fs, root, infos)

    def shard(path: str, layout: Literal["tar", "files", "folder"], files: Mapping[str, Info], folder: str) -> Shard:
        if not _is_utf8(path):
            raise CorpusError(f"the file name {path!a} is not UTF-8; rename it")
        return Shard(
            dataset=dataset or basename(root) or "data",
            source=_uri(fs, root),
            name=relpath(path, root),
            layout=layout,
            is_img2dataset=folder in img2dataset,
            fs=fs,
            files=files,
            captions=captions,
        )

    for folder, files in by_folder.items():
        for path in files:
            if path.endswith(".tar"):
                table = splitext(path)[0] + ".parquet"
                own = {p: files[p] for p in (path, table) if p in files}
                yield shard(path, "tar", own, folder)
        if any(_suffix(path) in IMAGE_SUFFIXES for path in files):
            if dirname(folder) in img2dataset and basename(folder).isdigit():
                yield shard(folder, "files", files, dirname(folder))
            else:
                yield shard(folder, "folder", _with_metadata(files, root, infos), folder)


def _why_incomplete(shard: Shard, infos: Mapping[str, Info]) -> str | None:
    """img2dataset writes the stats file last; other tars are complete when they end as a tar ends: in zeros."""
    if shard.is_img2dataset:
        stats = splitext(join(_root_of(shard), shard.name))[0] + "_stats.json"
        return None if stats in infos else f"{basename(stats)} is missing: img2dataset has not finished this shard"
    if shard.layout != "tar":
        return None
    path = next(path for path in shard.files if path.endswith(".tar"))
    with shard.fs.open(path, "rb") as file:
        size = int(shard.files[path]["size"])
        file.seek(max(size - 1024, 0))
        ending = file.read(1024)
    if len(ending) == 1024 and not any(ending):
        return None
    return "the tar does not end as a tar should: it is cut short, or still being written"


def _root_of(shard: Shard) -> str:
    return str(shard.fs._strip_protocol(shard.source))


def _with_metadata(files: dict[str, Info], root: str, infos: Mapping[str, Info]) -> dict[str, Info]:
    """A folder depends on the metadata files of the folders above it, too: their change must be noticed."""
    above = {p: i for p, i in infos.items() if basename(p) in {"metadata.jsonl", "metadata.csv"}}
    folder = dirname(next(iter(files)))
    return {**files, **{p: i for p, i in above.items() if (folder + "/").startswith(dirname(p) + "/")}}


def _uri(fs: Any, path: str) -> str:
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return path if protocol in {"file", "local"} else str(fs.unstrip_protocol(path))


def _is_hidden(path: str) -> bool:
    """img2dataset keeps unfinished work in `_tmp`; a name with a leading dot is nobody's data."""
    return any(part == "_tmp" or part.startswith(".") for part in path.split("/"))


def _is_utf8(path: str) -> bool:
    """Python stands for the bytes of a name that are not by lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def _suffix(path: str) -> str:
    return splitext(path)[1][1:].lower()


def _modified(info: Info) -> str:
    return str(info.get("mtime") or info.get("LastModified") or info.get("ETag") or "")


# Tars


def _tar_samples(shard: Shard) -> Iterator[Sample]:
    path = next(path for path in shard.files if path.endswith(".tar"))
    rows = cache(lambda: _parquet_rows(shard))
    with shard.fs.open(path, "rb") as file:
        key, group = "", _Group()
        for member_key, suffix, offset, size in _tar_members(file):
            if suffix is None:  # the end of what can be read
                rest = _tar_sample(shard, key, group, path=path, rows=rows) if group.parts else None
                if isinstance(rest, Pair):  # else it is incomplete because the tar is
                    yield rest
                yield shard.bad(member_key, offset, "the tar is damaged or cut short here")
                return
            if group.parts and (member_key != key or suffix in group.parts):
                yield _tar_sample(shard, key, group, path=path, rows=rows)
                group = _Group()
            key = member_key
            file.seek(offset)
            is_wanted = suffix in WANTED_SUFFIXES and size <= MAX_IMAGE_BYTES
            group.parts[suffix] = (offset, file.read(size) if is_wanted else None)
        if group.parts:
            yield _tar_sample(shard, key, group, path=path, rows=rows)


@dataclass(slots=True)
class _Group:
    """The files of one sample: suffix -> (offset in the tar, content, or None when not wanted or too large to hold)."""

    parts: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)


def _tar_members(file: Any) -> Iterator[tuple[str, str | None, int, int]]:
    """(key, suffix, offset, size) of every regular file; a damaged tar ends with a suffix of None."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the caller owns the file
    except tarfile.TarError:
        yield ("", None, 0, 0)
        return
    last = ""
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
            yield (last, None, tar.offset, 0)
            return
        if member is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # else it remembers every member of a large tar
        match = TAR_KEY.match(member.name)
        if not member.isreg() or match is None:
            continue
        last = match[1]
        if member.offset_data + member.size > end:
            yield (last, None, member.offset_data, 0)
            return
        yield (last, match[2].lower(), member.offset_data, member.size)
    file.seek(tar.offset)
    block = file.read(512)
    if len(block) < 512 or any(block):  # tarfile takes a damaged header for the end
        yield (last, None, tar.offset, 0)


def _tar_sample(
    shard: Shard, key: str, group: _Group, *, path: str, rows: Callable[[], Mapping[str, Mapping[str, Any]]]
) -> Sample:
    suffix = next((s for s in group.parts if s in IMAGE_SUFFIXES), None)
    if suffix is None:
        return shard.bad(key, next(iter(group.parts.values()))[0], "no image")
    offset, encoded = group.parts[suffix]
    if encoded is None:
        return shard.bad(key, offset, f"the image file is larger than {MAX_IMAGE_BYTES} bytes")
    metadata = _metadata(group.parts["json"][1]) if "json" in group.parts else dict(rows().get(key, {}))
    text = group.parts["txt"][1] if "txt" in group.parts else None
    location = ImageLocation(uri=_uri(shard.fs, path), offset=offset, size=len(encoded))
    return _sample(shard, key, text=text, metadata=metadata, image=location, encoded=encoded)


def _parquet_rows(shard: Shard) -> dict[str, dict[str, Any]]:
    """img2dataset's table of the shard by key, for samples whose json is not in the tar."""
    import pyarrow.parquet

    path = next((path for path in shard.files if path.endswith(".parquet")), None)
    if path is None:
        return {}
    with shard.fs.open(path, "rb") as file:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    return {str(row["key"]): json.loads(json.dumps(row, default=str)) for row in rows if "key" in row}


# Folders


def _file_samples(shard: Shard) -> Iterator[Sample]:
    """img2dataset's `files` output names a sample by its number; in a free folder the whole file name is the key."""
    for path in sorted(path for path in shard.files if _suffix(path) in IMAGE_SUFFIXES):
        stem = splitext(path)[0]
        key = basename(stem if shard.layout == "files" else path)
        if int(shard.files[path]["size"]) > MAX_IMAGE_BYTES:
            yield shard.bad(key, None, f"the image file is larger than {MAX_IMAGE_BYTES} bytes")
            continue
        text = _read_bytes(shard, stem + ".txt")
        sidecar = _read_bytes(shard, stem + ".json")
        metadata = {**shard.captions(path), **_metadata(sidecar)} if sidecar else dict(shard.captions(path))
        with shard.fs.open(path, "rb") as file:
            encoded = file.read()
        location = ImageLocation(uri=_uri(shard.fs, path))
        yield _sample(shard, key, text=text, metadata=metadata, image=location, encoded=encoded)


def _read_bytes(shard: Shard, path: str) -> bytes | None:
    if path not in shard.files:
        return None
    with shard.fs.open(path, "rb") as file:
        return bytes(file.read())


def _caption_lookup(fs: Any, root: str, infos: Mapping[str, Info]) -> Callable[[str], Mapping[str, Any]]:
    """Rows of the nearest `metadata.jsonl` or `metadata.csv` at or above an image, by `file_name` relative to it."""

    @cache
    def rows_at(folder: str) -> Mapping[str, Mapping[str, Any]]:
        for name, parse in (("metadata.jsonl", _json_lines), ("metadata.csv", _csv_rows)):
            path = join(folder, name)
            if path in infos:
                with fs.open(path, "rb") as file:
                    return parse(path, file.read())
        return {}

    def lookup(path: str) -> Mapping[str, Any]:
        folder = dirname(path)
        while True:
            row = rows_at(folder).get(relpath(path, folder))
            if row is not None or folder == root or dirname(folder) == folder:
                return row or {}
            folder = dirname(folder)

    return lookup


def _json_lines(path: str, content: bytes) -> dict[str, dict[str, Any]]:
    rows = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _json_value(line)
            rows[str(row.pop("file_name"))] = row
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CorpusError(
                f'line {number} of {path} is not an object with a "file_name"; mend or remove it'
            ) from error
    return rows


def _csv_rows(path: str, content: bytes) -> dict[str, dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace")))
    if "file_name" not in (reader.fieldnames or ()):
        raise CorpusError(f"{path} has no column file_name, which ties a row to its image; add one")
    return {row.pop("file_name"): {k: v for k, v in row.items() if k is not None} for row in reader}


# Samples


class _BadMetadata(dict[str, Any]):
    """Stands for a json file that could not be read."""


def _metadata(content: bytes | None) -> dict[str, Any]:
    """A json object; NaN and Infinity, which no other reader of ours would take, become null."""
    try:
        value = _json_value((content or b"null").decode())
    except (ValueError, RecursionError):
        return _BadMetadata()
    return value if isinstance(value, dict) else {"value": value}


def _json_value(text: str) -> Any:
    value = json.loads(text, parse_constant=lambda _: None)
    if "\\ud" in text.lower():  # half of a surrogate pair can be written in json, but not in UTF-8
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def _sample(
    shard: Shard, key: str, *, text: bytes | None, metadata: dict[str, Any], image: ImageLocation, encoded: bytes
) -> Sample:
    """A Pair, or what is wrong with it. The caption is the `.txt` file's, else the metadata's `caption` or `text`."""
    if isinstance(metadata, _BadMetadata):
        return shard.bad(key, image.offset, "the json beside the image cannot be read")
    status = metadata.get("status", "success")
    if shard.is_img2dataset and status != "success":
        return shard.bad(key, image.offset, f"img2dataset status is {status!r}")
    try:
        caption = text.decode() if text is not None else _first_text(metadata, ("caption", "text"))
    except UnicodeDecodeError:
        return shard.bad(key, image.offset, "the caption is not UTF-8")
    caption = " ".join(caption.split())
    if not caption:
        return shard.bad(key, image.offset, "no caption")
    return Pair(
        dataset=shard.dataset,
        shard=shard.name,
        key=key,
        caption=caption,
        image=image,
        encoded=encoded,
        metadata={name: value for name, value in metadata.items() if name != "caption"},
    )


def _first_text(metadata: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((str(metadata[name]) for name in names if metadata.get(name)), "")
