"""The K nearest pairs of every pair of a source: what a model with a memory is trained beside. Streamed to Parquet.

Memory is that of one batch. Every shard leaves a part file, and the parts are joined at the end, so that a run that was
stopped goes on where it was. A pair and what shows its picture are never among its own neighbours, unless asked for.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from index.atomic import new_file, write_bytes
from index.errors import ConfigError, CorpusError
from index.ingest.readers import Sample, Shard, SkippedShard, check_source, read
from index.records import Hit, Pair
from index.search.copies import Copies, Pictures
from index.search.duplicates import NEAR, NEAR_BITS
from index.search.fusion import FusionRule
from index.search.ids import distinct
from index.search.view import View

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from index.knowledge_base import KnowledgeBase

BATCH = 256  # pairs looked up at once,
BATCH_BYTES = 256 << 20  # but so many bytes of them, images included, where every search loads the searcher anew
_PAIR_BYTES, _HIT_BYTES = 4096, 1024  # of a pair beside its image, with its vector; and of each of its neighbours
GROUP_ROWS = 4096  # rows of a row group of the output
_MANY_EXCLUDED = (64, 512)  # ids; pairs with more are asked apart
METADATA_KEY = b"radt.neighbors"  # of the Parquet file: the settings, snapshot and shards it was made from


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborsConfig:
    """What a neighbour is, and what is asked with: the pair's caption, or its image (by words the caption speaks)."""

    k: int = 8
    by: Literal["hybrid", "clip", "bm25"] = "hybrid"
    fusion: FusionRule = "rrf"
    query: Literal["caption", "image"] = "caption"
    exclude_group: bool = True  # leave out the pair itself and all that shows its picture
    where: str | None = None  # neighbours are among the pairs that this SQL filter lets through

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}")
        if self.query == "image" and self.by == "bm25":
            raise ConfigError("bm25 compares words, so --query image has no effect on it; ask by clip or hybrid")


@dataclass(kw_only=True, slots=True)
class NeighborsReport:
    """What a run did. `short` counts the pairs that have fewer than k neighbours, `kept` the shards done before.

    `ungrouped` pairs of the knowledge base have not been looked at for duplicates; `warning` says what follows.
    """

    out: str
    pairs: int = 0
    short: int = 0
    bad: int = 0
    shards_done: int = 0
    shards_kept: int = 0
    skipped: list[SkippedShard] = field(default_factory=list)
    seconds: float = 0.0
    snapshot: int = 0
    ungrouped: int = 0
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def write_neighbors(
    kb: "KnowledgeBase",
    source: str,
    out: str | Path,
    config: NeighborsConfig,
    *,
    dataset: str | None = None,
    allow_partial: bool = False,
    on_pairs: Callable[[int], None] = lambda pairs: None,
    on_shard: Callable[[str], None] = lambda shard: None,
) -> NeighborsReport:
    """Write the neighbours of every pair of `source`, any layout that a build reads, to the Parquet file `out`.

    Columns: id, dataset, shard, key, caption, neighbor_ids (list of int64, best first), scores (list of float32, what
    `by` scores). Rows are in the order of the source, so the same source and snapshot give the same file. A run that
    was stopped goes on after its last whole shard; a finished one has nothing to do. When settings, source or
    snapshot are others than those of the part files, they are made anew. CorpusError when no pair can be read.

    A neighbour never shows the picture of its pair: not the same bytes, nothing of a duplicate group with those, and
    nothing that looks alike as such a group's pairs do (see `Copies.among`), be the pair in the knowledge base or not.
    """
    started = time.perf_counter()
    _check_places(source, Path(out))
    path, report = Path(out), NeighborsReport(out=str(out))
    finder = _Finder(kb, config)
    report.snapshot = finder.snapshot
    report.ungrouped, report.warning = finder.ungrouped
    shards: list[Shard] = []
    for shard in read(source, dataset=dataset, allow_partial=allow_partial):
        shards.append(shard) if isinstance(shard, Shard) else report.skipped.append(shard)
    settings = {
        **asdict(config),
        "model": kb.manifest.fingerprint,
        "snapshot": report.snapshot,
        "same_picture": [NEAR, NEAR_BITS],
    }
    made_from = json.dumps({"settings": settings, "shards": [_name(shard) for shard in shards]}, sort_keys=True)
    if _read_mark(path) == made_from:
        report.shards_kept = len(shards)
        report.pairs, report.short = _count(path, config.k)
    else:
        parts = _parts_folder(path, settings)
        for shard in shards:
            _write_part(shard, parts / f"{_name(shard)}.parquet", finder, report, on_pairs=on_pairs)
            on_shard(shard.name)
        report.pairs, report.short = _join([parts / f"{_name(s)}.parquet" for s in shards], path, made_from, k=config.k)
        shutil.rmtree(parts)
    if not report.pairs:
        raise CorpusError(f"no pair of {source!r} could be read; `radt index build` says what is wrong with each")
    report.seconds = time.perf_counter() - started
    return report


class _Finder:
    """Finds the neighbours of many pairs at once, in the knowledge base as it was when this was made."""

    def __init__(self, kb: "KnowledgeBase", config: NeighborsConfig):
        self._retriever = kb.retriever  # once: to ask for it again is to see what others have committed since
        view = self._retriever.view
        self.snapshot = int(view.version)
        self._config = config
        needs_copies = config.exclude_group or config.query == "image"
        self._copies = Copies(kb.store, view, kb.embedder) if needs_copies else None
        self.ungrouped = _ungrouped(kb, view) if config.exclude_group else (0, "")
        manifest = kb.searcher_manifest()
        self._is_resident = manifest is None or manifest.settings.get("is_resident", True)
        most = max(BATCH, BATCH_BYTES // (_PAIR_BYTES + config.k * _HIT_BYTES))
        self.batch_rows = BATCH if self._is_resident else most

    def __call__(self, pairs: Sequence[Pair]) -> list[tuple[Pair, list[Hit]]]:
        """Each pair with its neighbours, best first; a pair whose image is needed and cannot be read is left out."""
        if self._copies is None:
            return list(zip(pairs, self._search(pairs, None, None), strict=True))
        pictures, vectors = self._copies.pictures(pairs), None
        if self._config.query == "image":
            self._copies.embed(pictures, np.arange(len(pairs)))
            pictures = pictures.readable()
            vectors = pictures.vectors
        if not self._config.exclude_group:
            return list(zip(pictures.pairs, self._search(pictures.pairs, vectors, None), strict=True))
        return list(zip(pictures.pairs, self._of_others(self._copies, pictures, vectors), strict=True))

    def _of_others(
        self, copies: Copies, pictures: Pictures, vectors: Float32[ndarray, "n d"] | None
    ) -> list[list[Hit]]:
        """Neighbours that show other pictures: while a hit shows the same, it is excluded and the search repeated."""
        excluded = copies.of(pictures)
        found: list[list[Hit]] = [[] for _ in excluded]
        pending = np.arange(len(excluded))
        while len(pending):
            answers = self._search(
                [pictures.pairs[row] for row in pending.tolist()],
                None if vectors is None else vectors[pending],
                [excluded[row] for row in pending.tolist()],
            )
            for row, hits in zip(pending.tolist(), answers, strict=True):
                found[row] = hits
            repeats = copies.among(pictures, pending, answers)
            for row, ids in repeats.items():
                excluded[row] = distinct(excluded[row], ids)
            pending = np.array(list(repeats), dtype=np.int64)
        return found

    def _search(
        self,
        pairs: Sequence[Pair],
        vectors: Float32[ndarray, "n d"] | None,
        excluded: Sequence[Int64[ndarray, " _"]] | None,
    ) -> list[list[Hit]]:
        """Pairs of which much is excluded are asked apart: all of a search go as deep as the one that must.

        Not where every search loads the searcher anew, which takes longer than depth does.
        """
        found: list[list[Hit]] = [[] for _ in pairs]
        depth = np.zeros(len(pairs), np.int64)
        if excluded is not None and self._is_resident:
            depth = np.digitize([len(ids) for ids in excluded], _MANY_EXCLUDED)
        for lot in np.unique(depth):
            rows = np.nonzero(depth == lot)[0].tolist()
            hits = self._retriever.search_many(
                [pairs[row].caption for row in rows],
                vectors=None if vectors is None else vectors[rows],
                k=self._config.k,
                by=self._config.by,
                fusion=self._config.fusion,
                where=self._config.where,
                exclude=None if excluded is None else [excluded[row].tolist() for row in rows],
            )
            for row, own in zip(rows, hits, strict=True):
                found[row] = own
        return found


# Part files


def _name(shard: Shard) -> str:
    """Names a shard as it is now: another content, another name."""
    text = json.dumps([shard.dataset, shard.name, shard.stamp])
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _parts_folder(path: Path, settings: dict[str, Any]) -> Path:
    """The folder of the part files of these settings; those of others are deleted."""
    folder = path.with_name(f".{path.name}.parts")
    mark, wanted = folder / "settings.json", json.dumps(settings, sort_keys=True)
    if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write_bytes(mark, wanted.encode())
    return folder


def _write_part(
    shard: Shard, part: Path, finder: _Finder, report: NeighborsReport, *, on_pairs: Callable[[int], None]
) -> None:
    """The neighbours of one shard's pairs, written whole or not at all."""
    if part.exists():
        report.shards_kept += 1
        return
    import pyarrow.parquet as pq

    with new_file(part) as partial, pq.ParquetWriter(partial, _schema()) as writer:
        rows: list[dict[str, Any]] = []
        for samples in _batches(shard, finder.batch_rows):
            pairs = [sample for sample in samples if isinstance(sample, Pair)]
            answers = finder(pairs) if pairs else []
            report.bad += len(samples) - len(answers)
            rows += [_row(pair, hits) for pair, hits in answers]
            if len(rows) >= GROUP_ROWS:
                _write_rows(writer, rows)
                rows = []
            on_pairs(len(samples))
        _write_rows(writer, rows)
    report.shards_done += 1


def _join(parts: Sequence[Path], path: Path, made_from: str, *, k: int) -> tuple[int, int]:
    """All parts in one file, and how many rows it has and how many of them are short; a row group at a time."""
    import pyarrow.parquet as pq

    schema = _schema().with_metadata({METADATA_KEY: made_from.encode()})
    with new_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group).cast(schema))
    return _count(path, k)


def _count(path: Path, k: int) -> tuple[int, int]:
    """Rows of the file, and how many of them have fewer than `k` neighbours."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    pairs = short = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["neighbor_ids"]):
            pairs += len(batch)
            short += int(pc.sum(pc.less(pc.list_value_length(batch.column(0)), k)).as_py() or 0)
    return pairs, short


def _read_mark(path: Path) -> str | None:
    """What a finished file says it was made from; None where there is no such file."""
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        with pq.ParquetFile(path) as file:
            return (file.schema_arrow.metadata or {}).get(METADATA_KEY, b"").decode()
    except (OSError, ValueError):  # something else of that name, or half a copy of one
        return None


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([
        pa.field("id", pa.int64(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("neighbor_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ])


def _row(pair: Pair, hits: Sequence[Hit]) -> dict[str, Any]:
    return {
        "id": pair.id,
        "dataset": pair.dataset,
        "shard": pair.shard,
        "key": pair.key,
        "caption": pair.caption,
        "neighbor_ids": [hit.id for hit in hits],
        "scores": [hit.score for hit in hits],
    }


def _write_rows(writer: "pq.ParquetWriter", rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=_schema()))


def _batches(shard: Shard, rows: int) -> Iterator[list[Sample]]:
    """The samples of a shard, at most so many at once, and not many more bytes than `BATCH_BYTES`."""
    samples, batch, held = shard.samples(), list[Sample](), 0
    try:
        for sample in samples:
            batch.append(sample)
            held += _PAIR_BYTES + (len(sample.encoded or b"") if isinstance(sample, Pair) else 0)
            if len(batch) >= rows or held >= BATCH_BYTES:
                yield batch
                batch, held = [], 0
    except OSError as error:
        raise CorpusError(f"shard {shard.name!r} of {shard.source} cannot be read: {error}") from error
    if batch:
        yield batch


def _ungrouped(kb: "KnowledgeBase", view: View) -> tuple[int, str]:
    """How many pairs of the knowledge base no duplicate group was looked for, and a sentence when there are some."""
    manifest, pairs = view.duplicates.manifest, len(kb)
    newer = kb.unsearched()
    ungrouped = newer if manifest is not None and manifest.near is not None else pairs
    if not ungrouped:
        return 0, ""
    if manifest is None:
        why = "the knowledge base was built without duplicate groups (`radt index build --duplicates` finds them)"
    elif manifest.near is None:
        why = "the duplicate groups of the knowledge base are of equal bytes alone"
    else:
        why = f"{newer:,} pairs are newer than the duplicate groups (`radt index compact` brings those up to date)"
    return ungrouped, f"{why}: of these, what looks like a training picture is left out, but not what looks like that"


def _check_places(source: str, out: Path) -> None:
    """See that the source is there and that the output does not lie in it, where it would be read as a part of it."""
    check_source(source)
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"the output {out} lies inside the source {source}; put it elsewhere")
