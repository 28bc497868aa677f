"""Read image-text pairs where they lie, local or in a bucket: nothing is written, unpacked or downloaded first.

`read(source)` yields shards; a shard's `samples()` yields a Pair or a BadSample for everything in it. A source is a
folder, a file or a pattern of files; how it is laid out is found by looking, and `Shard.layout` says it:

- "img2dataset tars", "img2dataset files", "img2dataset parquet": its output, shards without stats being unfinished
- "webdataset tars": tars of `KEY.jpg`, `KEY.txt`, `KEY.json`
- "image folders": images with captions in `.txt` or `.json` beside them or in a `metadata.jsonl` or `metadata.csv`
- "parquet of images", "parquet of paths": image bytes, also as Hugging Face has them, or the paths of images
- "clip-retrieval": `img_emb/*.npy` and `metadata/*.parquet`, pairs that bring their vectors
- "lance table": `X.lance`, with or without vectors

Next on the main path: `index/ingest/build.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from posixpath import basename, join

from index.errors import CorpusError
from index.ingest.embedding_reader import find_embeddings
from index.ingest.folder_reader import find_folders, find_img2dataset_folders
from index.ingest.lance_reader import find_lance
from index.ingest.parquet_reader import find_parquet
from index.ingest.shards import IMAGE_SUFFIXES, Layout, Listing, Sample, Shard, SkippedShard, beside
from index.ingest.sources import choose, named_files, open_place, reachable
from index.ingest.tar_reader import find_tars

__all__ = ["IMAGE_SUFFIXES", "Layout", "Sample", "Shard", "SkippedShard", "check_source", "read"]

LAYOUTS = (
    "img2dataset output, WebDataset tars, a folder of images with captions in .txt files beside them or in a "
    "metadata.jsonl or metadata.csv, Parquet files with image bytes or paths, clip-retrieval output, or a Lance table"
)
TABLES = {"parquet of images", "parquet of paths", "clip-retrieval", "lance table"}  # may name images elsewhere


def read(
    source: str,
    *,
    dataset: str | None = None,
    allow_partial: bool = False,
    on_listed: Callable[[int], None] = lambda shards: None,
) -> Iterator[Shard | SkippedShard]:
    """The shards of a source, sorted by name. CorpusError when there is nothing to read.

    A source is a folder with all below it, a file, or a pattern (`data/*.tar`, `data/{00000..00012}.tar`). The dataset
    is named after the folder unless told. A file belongs to the folder that it lies in, so that it is the same shard
    whether it is named alone or found with the others. `on_listed` hears how many there are.
    """
    chosen = choose(source)
    listing = Listing(
        fs=chosen.fs,
        root=chosen.root,
        dataset=dataset or basename(chosen.root) or "data",
        files=chosen.files,
        left=dict(chosen.files),
    )
    found = [*chosen.missing, *filter(chosen.has, _find(listing))]
    if not any(isinstance(shard, Shard) for shard in found):
        _refuse(source, found)
    on_listed(len(found))
    for shard in sorted(found, key=lambda shard: shard.name):
        reason = None if allow_partial or isinstance(shard, SkippedShard) else _why_incomplete(shard, listing)
        yield SkippedShard(name=shard.name, reason=reason) if reason else shard


def check_source(source: str) -> None:
    """CorpusError or MissingExtraError when there is nothing there, or no way to get at it."""
    fs, path = open_place(source)
    with reachable(source):
        named_files(fs, path, source)


def _find(listing: Listing) -> Iterator[Shard | SkippedShard]:
    """Each layout takes its files out of the listing. Images without captions are then those that a table names."""
    described = [*find_lance(listing), *find_embeddings(listing)]
    described += [*find_tars(listing), *find_img2dataset_folders(listing), *find_parquet(listing)]
    yield from described
    has_table = any(isinstance(shard, Shard) and shard.layout in TABLES for shard in described)
    yield from find_folders(listing, only_captioned=has_table)


def _refuse(source: str, found: Sequence[Shard | SkippedShard]) -> None:
    first = next((shard for shard in found if isinstance(shard, SkippedShard)), None)
    if first is not None:
        where = "" if basename(first.name) in first.reason else f"{first.name}: "
        raise CorpusError(f"nothing in {source!r} can be read ({where}{first.reason})")
    raise CorpusError(f"no image-text pairs in {source!r}: expected {LAYOUTS}")


def _why_incomplete(shard: Shard, listing: Listing) -> str | None:
    """img2dataset writes the stats file last; a tar is complete when it ends in zeros, a Parquet file in its mark."""
    if shard.is_img2dataset:
        stats = beside(join(listing.root, shard.name), "_stats.json")
        is_finished = stats in listing.files
        return None if is_finished else f"{basename(stats)} is missing: img2dataset has not finished this shard"
    path = join(listing.root, shard.name)
    if shard.layout == "webdataset tars":
        end = _tail(shard, path, 1024)
        is_complete = len(end) == 1024 and not any(end)
    elif shard.layout.startswith("parquet"):
        is_complete = _tail(shard, path, 4) in {b"PAR1", b"PARE"}
    else:
        is_complete = True
    return None if is_complete else "it does not end as such a file should: it is cut short, or still being written"


def _tail(shard: Shard, path: str, count: int) -> bytes:
    size = int(shard.files[path]["size"])
    return bytes(shard.fs.cat_file(path, start=max(size - count, 0), end=size)) if size else b""
