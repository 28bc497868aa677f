"""A shard: the unit of a build, whatever it is made of; and the listing of a source that readers find shards in.

What a shard holds is known to its `contents`, one small class for each layout (`tar_reader.py`, `folder_reader.py`,
`parquet_reader.py`, `embedding_reader.py`, `lance_reader.py`). All of it can be pickled, so that another process or
machine can read a shard.
"""

import errno
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from posixpath import basename, dirname, join, normpath, relpath, splitext
from typing import Any, Literal, Protocol, runtime_checkable

from index.errors import CorpusError
from index.records import BadSample, Pair
from index.text import writable

Layout = Literal[
    "img2dataset tars",
    "img2dataset files",
    "img2dataset parquet",
    "webdataset tars",
    "image folders",
    "parquet of images",
    "parquet of paths",
    "clip-retrieval",
    "lance table",
]

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
MAX_IMAGE_BYTES = 256 << 20  # an encoded image above this is not read into memory
READ_AHEAD = 8 << 20  # bytes asked of a bucket at once
READ_TOGETHER = 64  # small files asked of a bucket at once
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EINVAL}
STORAGE_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "fsspec", "s3fs", "gcsfs", "adlfs", "azure", "google"}
CHANGE_MARKS = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created")

Sample = Pair | BadSample
Info = Mapping[str, Any]


@runtime_checkable
class Contents(Protocol):
    """What a shard is made of, and how to read it."""

    def samples(self, shard: "Shard") -> Iterator[Sample]:
        """Everything in it, in stored order. CorpusError where the rest cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedShard:
    """A shard that is not complete yet or cannot be read, and why we think so."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One unit of a build: a tar, the images of one directory, a table's file. It is stored whole or not at all."""

    dataset: str
    source: str
    name: str  # its path relative to the source; a Lance fragment adds `#` and its number
    layout: Layout
    fs: Any = field(repr=False)
    files: Mapping[str, Info] = field(repr=False)  # path -> fsspec info: all that its samples are made of
    contents: Contents = field(repr=False)
    mark: str = ""  # what else its samples depend on

    @property
    def is_img2dataset(self) -> bool:
        """Whether img2dataset wrote it, so that its stats file tells when it is complete."""
        return self.layout.startswith("img2dataset")

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(int(info["size"] or 0) for info in self.files.values())

    @property
    def stamp(self) -> str:
        """A hash of names, sizes and times or ETags: equal stamps mean unchanged files, without reading them."""
        listing = [(path, info["size"], change_mark(info)) for path, info in sorted(self.files.items())]
        return blake2b(json.dumps([listing, self.mark]).encode(), digest_size=16).hexdigest()

    def digest(self) -> str:
        """A hash of the names and the content of its files; a bucket's ETag stands for the content of an object."""
        state = blake2b(self.mark.encode(), digest_size=16)
        for path in sorted(self.files):
            state.update(basename(path).encode("utf-8", "surrogateescape") + b"\0")
            etag = self.files[path].get("ETag") or self.files[path].get("etag")
            if etag:
                state.update(str(etag).encode())
                continue
            with storage_errors(), open_ahead(self.fs, path) as file:
                while block := file.read(1 << 20):
                    state.update(block)
        return state.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Everything in it, in stored order; of two pairs of one key the first. What cannot be read is a BadSample."""
        seen: set[str] = set()
        try:
            with storage_errors():
                for sample in self.contents.samples(self):
                    yield self._checked(sample, seen)
        except CorpusError as error:
            yield self.bad("", None, str(error))

    def _checked(self, sample: Sample, seen: set[str]) -> Sample:
        key = writable(sample.key)
        if key != sample.key:
            offset = sample.image.offset if isinstance(sample, Pair) else sample.offset
            return self.bad(key, offset, "the file name is not UTF-8")
        if isinstance(sample, Pair):
            if key in seen:
                return self.bad(key, sample.image.offset, "duplicate key")
            seen.add(key)
        return sample

    def bad(self, key: str, offset: int | None, reason: str) -> BadSample:
        """A BadSample of this shard. An empty key means the shard, or a stretch of it."""
        return BadSample(shard=self.name, key=key, offset=offset, reason=reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of a source. Each layout takes those it knows, and the next one sees what is left."""

    fs: Any
    root: str
    dataset: str
    files: Mapping[str, Info]  # path -> fsspec info; hidden and unfinished ones are not here
    left: dict[str, Info]

    def take(self, paths: Iterable[str]) -> dict[str, Info]:
        """Those of `paths` that nobody has taken yet, and no longer in `left`."""
        return {path: self.left.pop(path) for path in paths if path in self.left}

    def folders(self) -> dict[str, list[str]]:
        """Folder -> the paths left in it, sorted."""
        folders: dict[str, list[str]] = {}
        for path in sorted(self.left):
            folders.setdefault(dirname(path), []).append(path)
        return folders

    def shard(self, path: str, layout: Layout, files: Mapping[str, Info], contents: Contents) -> Shard:
        """A shard of this source, named by `path`. CorpusError when it has a name that cannot be stored."""
        if not _is_utf8(path):
            raise CorpusError(f"the file name {path!a} is not UTF-8; rename it")
        return Shard(
            dataset=self.dataset,
            source=uri_of(self.fs, self.root),
            name=relpath(path, self.root),
            layout=layout,
            fs=self.fs,
            files=files,
            contents=contents,
        )

    def skipped(self, path: str, reason: str) -> SkippedShard:
        """A shard that is not read."""
        return SkippedShard(name=relpath(path, self.root), reason=reason)


def beside(path: str, ending: str) -> str:
    """The path with another ending: `00000.tar` -> `00000_stats.json`."""
    return splitext(path)[0] + ending


def suffix_of(path: str) -> str:
    """The last suffix, in small letters, without its dot."""
    return splitext(path)[1][1:].lower()


def change_mark(info: Info) -> str:
    """The ETag or the time of change of a file, whatever its file system calls it."""
    return next((str(info[name]) for name in CHANGE_MARKS if info.get(name)), "")


def is_local(fs: Any) -> bool:
    """Whether these are files of this machine."""
    return bool({"file", "local"} & ({fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)))


def uri_of(fs: Any, path: str) -> str:
    """What fsspec opens the file by: a plain path on this machine, else a URL."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def path_in(folder: str, name: str) -> str:
    """The path that `name` means in a file that lies in `folder`."""
    return normpath(join(folder, name))


# Opening


@contextmanager
def storage_errors() -> Iterator[None]:
    """OSError for whatever the clients of buckets raise: like a failing disk, it says nothing about the content."""
    try:
        yield
    except (OSError, CorpusError):
        raise
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error


def is_storage_error(error: Exception) -> bool:
    """Whether the disk, the network or a bucket failed; pyarrow's own OSErrors, of damaged files, have no errno."""
    is_system = isinstance(error, OSError) and error.errno is not None
    return is_system or type(error).__module__.partition(".")[0] in STORAGE_CLIENTS


def open_ahead(fs: Any, path: str) -> Any:
    """A file to be read from its start to its end: a bucket is asked for large blocks, before they are needed."""
    if is_local(fs):
        return open(path, "rb", buffering=1 << 20)
    return io.BufferedReader(fs.open(path, "rb", block_size=READ_AHEAD, cache_type="background"), 1 << 20)


def open_anywhere(fs: Any, path: str) -> Any:
    """A file to be read here and there."""
    return open(path, "rb") if is_local(fs) else fs.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead")


def read_files(fs: Any, paths: Sequence[str]) -> Iterator[bytes | OSError]:
    """The content of small files, or why there is none; a bucket is asked for many of them together.

    What is not a regular file, or is larger than MAX_IMAGE_BYTES, is an OSError too. Failures of the disk or of the
    network, which may pass, are raised.
    """
    if is_local(fs):
        yield from map(_read_local, paths)
        return
    for start in range(0, len(paths), READ_TOGETHER):
        some = list(paths[start : start + READ_TOGETHER])
        yield from map(_checked, fs.cat_ranges(some, 0, MAX_IMAGE_BYTES + 1, on_error="return"))


def _read_local(path: str) -> bytes | OSError:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            return OSError("it is not a file")
        if info.st_size > MAX_IMAGE_BYTES:
            return OSError(f"it is larger than {MAX_IMAGE_BYTES} bytes")
        with open(path, "rb") as file:
            return file.read()
    except ValueError as error:  # a name that no file can have
        return OSError(str(error))
    except OSError as error:
        if error.errno in ABSENT:
            return error
        raise


def _checked(content: Any) -> bytes | OSError:
    if isinstance(content, FileNotFoundError | PermissionError):
        return content
    if isinstance(content, OSError) and content.errno == errno.EINVAL:
        return b""  # S3 knows no range of an empty object
    if isinstance(content, Exception):
        raise content if isinstance(content, OSError) else OSError(str(content)) from content
    if len(content) > MAX_IMAGE_BYTES:
        return OSError(f"it is larger than {MAX_IMAGE_BYTES} bytes")
    return bytes(content)


def _is_utf8(path: str) -> bool:
    """Python stands for the bytes of a name that are not by lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in path)
