"""What a source names: a folder, a file, or a pattern of files, on this machine, in a bucket or on a web server."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from posixpath import join, relpath
from typing import Any

from index.errors import CorpusError, MissingExtraError
from index.ingest.shards import Info, Shard, SkippedShard, beside, suffix_of

MAX_PATTERN_FILES = 1_000_000
WILD = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"^(\d+)\.\.(\d+)$")
FILE_SUFFIXES = {"tar", "parquet", "npy", "gz", "tgz", "tfrecord"}
FRAGMENT = re.compile(r"(?<=\.lance)#\d+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a source names: the files to look at, and which shards among them are meant."""

    fs: Any
    root: str
    files: Mapping[str, Info]
    names: Sequence[str] = ()  # of files, with wildcards; none: everything
    missing: Sequence[SkippedShard] = ()

    def has(self, shard: Shard | SkippedShard) -> bool:
        """Whether the shard is one of those named, or has a file that is."""
        own = [join(self.root, FRAGMENT.sub("", shard.name)), *(shard.files if isinstance(shard, Shard) else ())]
        return not self.names or any(_matches(path, self.names) for path in own)


def choose(source: str) -> Choice:
    """The files of a folder, of a file's folder or of a pattern. CorpusError when there is nothing."""
    fs, path = open_place(source)
    names = named_files(fs, path, source)
    if not names:
        return Choice(fs=fs, root=path, files=_files_below(fs, path, path, depth=None))
    root = _common_folder(names)
    if path.endswith(".lance"):
        files = _files_below(fs, path, root, depth=None)
    elif _is_web(fs):
        files = _files_named(fs, names)
    else:
        depths = [None if "**" in name else name[len(root) :].count("/") for name in names]
        files = _files_below(fs, root, root, depth=None if None in depths else max(filter(None, depths)))
    exact = [name for name in names if not WILD.search(name) and not name.endswith(".lance")]
    missing = [SkippedShard(name=relpath(name, root), reason="it is not there") for name in exact if name not in files]
    return Choice(fs=fs, root=root, files=files, names=names, missing=missing)


def open_place(source: str) -> tuple[Any, str]:
    """The file system, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(source)
    except ImportError as error:
        raise MissingExtraError(f"{source!r} needs another package ({error}); install it with pip") from error
    except ValueError as error:
        raise CorpusError(
            f"{source!r} is of a kind that cannot be opened ({error}); check the part before ://"
        ) from error
    fs.invalidate_cache()  # a bucket's listing is remembered, and what changed since would not be seen
    return fs, path.rstrip("/") or "/"


def named_files(fs: Any, path: str, source: str) -> list[str]:
    """The files that a source names, wildcards left in; none when it is a folder. CorpusError when it is nothing."""
    if _is_web(fs):
        names = expand_braces(path)
        if WILD.search(path):
            raise CorpusError(f"{source!r} cannot be listed; name the files with {{000..012}} instead of a wildcard")
        return names if suffix_of(path) in FILE_SUFFIXES else []
    if fs.isfile(path) or (path.endswith(".lance") and fs.isdir(path)):
        return [path]
    if fs.exists(path):
        return []
    if not WILD.search(path) and not BRACES.search(path):
        raise CorpusError(f"there is nothing at {source!r}; check the path")
    names = expand_braces(path)
    if not fs.exists(_common_folder(names)):
        raise CorpusError(f"there is no folder {_common_folder(names)!r} for {source!r}; check the path")
    return names


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{00..12}` written out, as a shell does; wildcards stay."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = NUMBERS.match(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= MAX_PATTERN_FILES:
            raise CorpusError(f"{match[0]} names more than {MAX_PATTERN_FILES} files; name their folder instead")
        step = 1 if last >= first else -1
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    rests = expand_braces(pattern[match.end() :])
    if len(choices) * len(rests) > MAX_PATTERN_FILES:
        raise CorpusError(f"{pattern!r} names more than {MAX_PATTERN_FILES} files; name their folder instead")
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def _common_folder(names: Sequence[str]) -> str:
    """The deepest folder that all of them lie in and that has no wildcard."""
    parts = [name.split("/")[:-1] for name in names]
    common = [some[0] for some in takewhile(lambda some: len(set(some)) == 1, zip(*parts, strict=False))]
    return "/".join(takewhile(lambda part: not WILD.search(part), common)) or "/"


def _matches(path: str, names: Sequence[str]) -> bool:
    return path in _exact(tuple(names)) or any(pattern.match(path) for pattern in _wild(tuple(names)))


@lru_cache(maxsize=2)
def _exact(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


@lru_cache(maxsize=2)
def _wild(names: tuple[str, ...]) -> list[re.Pattern[str]]:
    from fsspec.utils import glob_translate

    return [re.compile(glob_translate(name)) for name in names if WILD.search(name)]


# Listing files


def _files_below(fs: Any, folder: str, root: str, *, depth: int | None) -> dict[str, Info]:
    """The files of a folder, without those that are hidden, unfinished or no files."""
    found = fs.find(folder, maxdepth=depth, detail=True).items()
    checked = ((path, _file_info(fs, path, info)) for path, info in found if not _is_hidden(relpath(path, root)))
    return {path: info for path, info in checked if info is not None}


def _files_named(fs: Any, names: Sequence[str]) -> dict[str, Info]:
    """Files that a server has, and what img2dataset puts beside them."""
    wanted = [path for name in names for path in (name, beside(name, ".parquet"), beside(name, "_stats.json"))]
    infos = {path: _file_info(fs, path, {}) for path in dict.fromkeys(wanted)}
    return {path: info for path, info in infos.items() if info is not None}


def _file_info(fs: Any, path: str, info: Info) -> Info | None:
    """What is known of a file, looked at again where the listing did not say enough; None for what is no file."""
    if info.get("type") == "file" and info.get("size") is not None:
        return info
    try:
        info = fs.info(path)  # follows a link
    except FileNotFoundError:
        return None
    return info if info["type"] == "file" and info["size"] is not None else None


def _is_hidden(path: str) -> bool:
    """img2dataset keeps unfinished work in `_tmp`; a name with a leading dot is nobody's data."""
    return any(part == "_tmp" or part.startswith(".") for part in path.split("/"))


def _is_web(fs: Any) -> bool:
    return "http" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
