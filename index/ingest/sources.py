"""What a source names: a folder, a file, or a pattern of files, on this machine, in a bucket or on a web server."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from posixpath import dirname, join, relpath
from typing import Any

from index.errors import CorpusError, MissingExtraError, UserError, damage
from index.ingest.shards import IMAGE_SUFFIXES, Info, Shard, SkippedShard, beside, suffix_of

MAX_PATTERN_FILES = 1_000_000
WILD = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"^(\d+)\.\.(\d+)$")
FILE_SUFFIXES = {"tar", "parquet", "npy", "gz", "tgz", "tfrecord"}
LANCE = ".lance"
FRAGMENT = re.compile(r"(?<=\.lance)#\d+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a source names: the files to look at, and which shards among them are meant."""

    fs: Any
    root: str
    files: Mapping[str, Info]
    exact: frozenset[str] = frozenset()  # names of files
    wild: Sequence[re.Pattern[str]] = ()  # patterns of names; without either, everything is meant
    missing: Sequence[SkippedShard] = ()

    def has(self, shard: Shard | SkippedShard) -> bool:
        """Whether the shard is one of those named, or has a file that is."""
        if not self.exact and not self.wild:
            return True
        own = [join(self.root, FRAGMENT.sub("", shard.name)), *(shard.files if isinstance(shard, Shard) else ())]
        return any(path in self.exact or any(name.match(path) for name in self.wild) for path in own)


def choose(source: str) -> Choice:
    """The files of a folder, of a file's folder or of a pattern. CorpusError when there is nothing."""
    from fsspec.utils import glob_translate

    fs, path = open_place(source)
    with reachable(source):
        names = named_files(fs, path, source)
        if not names:
            files = _files_below(fs, path, path, depth=None)
            _check_ranges(fs, files, source)
            return Choice(fs=fs, root=path, files=files)
        if any(suffix_of(name) in IMAGE_SUFFIXES for name in names):  # a shard is their folder, never a part of it
            raise CorpusError(f"{source!r} names single images; name their folder, or add each with a caption")
        is_there = len(names) == 1 and fs.exists(path)  # a name that looks like a pattern, perhaps
        root = dirname(path) if is_there else _common_folder(names)
        files = _files_named(fs, names) if _is_web(fs) else _files_around(fs, root, names, is_there=is_there)
        _check_ranges(fs, files, source)
    exact = frozenset(name for name in names if is_there or not WILD.search(name))
    lost = sorted(name for name in exact - files.keys() if not name.endswith(LANCE))
    return Choice(
        fs=fs,
        root=root,
        files=files,
        exact=exact,
        wild=[re.compile(glob_translate(name)) for name in names if name not in exact],
        missing=[SkippedShard(name=relpath(name, root), reason="it is not there") for name in lost],
    )


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


@contextmanager
def reachable(source: str) -> Iterator[None]:
    """CorpusError for whatever a storage client raises when it does not get at the source."""
    try:
        yield
    except (CorpusError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CorpusError(f"{source!r} cannot be reached ({reason}); check the address and your credentials") from error


@contextmanager
def sources_blamed() -> Iterator[None]:
    """CorpusError for any OSError but those that the store puts into words itself, or that a damaged table causes."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError) or damage(error):
            raise
        raise CorpusError(f"a source cannot be read ({error}); mend that and run the command again") from error


def named_files(fs: Any, path: str, source: str) -> list[str]:
    """The files that a source names, wildcards left in; none when it is a folder. CorpusError when it is nothing."""
    if _is_web(fs):
        names = expand_braces(path)
        if WILD.search(path):
            raise CorpusError(f"{source!r} cannot be listed; name the files with {{000..012}} instead of a wildcard")
        return names if suffix_of(path) in FILE_SUFFIXES else []
    if fs.isfile(path) or (path.endswith(LANCE) and fs.isdir(path)):
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


# Listing files


def _files_below(fs: Any, folder: str, root: str, *, depth: int | None) -> dict[str, Info]:
    """The files of a folder, without those that are hidden, unfinished or no files."""
    found = fs.find(folder, maxdepth=depth, detail=True).items()
    checked = ((path, _file_info(fs, path, info)) for path, info in found if not _is_hidden(relpath(path, root)))
    return {path: info for path, info in checked if info is not None}


def _files_around(fs: Any, root: str, names: Sequence[str], *, is_there: bool) -> dict[str, Info]:
    """The files of a folder, as deep as `names` go; a Lance table is a folder itself."""
    if is_there and names[0].endswith(LANCE):
        return _files_below(fs, names[0], root, depth=None)
    is_deep = any("**" in name or name.endswith(LANCE) for name in names)
    depth = None if is_deep else max(relpath(name, root).count("/") + 1 for name in names)
    return _files_below(fs, root, root, depth=depth)


def _check_ranges(fs: Any, files: Mapping[str, Info], source: str) -> None:
    """CorpusError when a web server does not give parts of files, which is what all readers ask for."""
    small = min(files, key=lambda path: int(files[path]["size"]), default=None) if _is_web(fs) else None
    if small is not None and len(fs.cat_file(small, start=0, end=1)) > 1:
        raise CorpusError(f"the server of {source!r} gives files only as a whole; download them, and build from there")


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
