"""Plan: bytes, seconds and structure of a knowledge base before it is made, from a short measured probe.

Counting is cheap (img2dataset's stats, the metadata of parquet files, else bytes); the probe reads, decodes, embeds
and writes a few hundred pairs with the real model. What the searcher takes follows from `index/search/sizes.py`, by
which the build chooses too; the word index from the unit costs below.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from posixpath import dirname
from typing import Any, Literal

import numpy as np

from index.embedder import Embedder
from index.errors import ConfigError, CorpusError
from index.ingest.decode import Decoded, KeepImages, decode_chunk, foreign_vectors
from index.ingest.engines import stored_pair
from index.ingest.meter import STAGES, Stage
from index.ingest.parquet_reader import DamagedTableError, open_table
from index.ingest.readers import Shard, SkippedShard, read
from index.ingest.shards import IMAGE_SUFFIXES, Sample, beside, suffix_of
from index.ingest.sources import sources_blamed
from index.knowledge_base import CALIBRATION_CAPTIONS, SearcherChoice
from index.records import BadSample, Pair, ShardRecord, StoredPair
from index.search.duplicates import COMPARED_ROWS
from index.search.searcher import DEFAULT_RECALL
from index.search.sizes import Structure, choose_structure, default_ram, working_bytes
from index.search.sizes import processors as usable_processors
from index.stats import folder_bytes
from index.store import INDEX_ROWS, PairStore

# 100,000 captions of ten words, 87 bytes, from 20,000 words; 2-core Intel Xeon, 2026-11-21
WORD_BYTES = 0.37  # of Lance's word index, for each byte of a caption; of a million captions 0.31 and 0.57
WORD_MEMORY = 2.0  # bytes that serving holds of it, for each byte of a caption; measured 1.7 and 2.1 with a million
WORD_SECONDS = 3.3e-6  # of one processor, for each caption
ID_INDEX_BYTES = 12.3  # for each row: id (BTREE) and kind (BITMAP), from 20,000 rows; measured with a million
ID_INDEX_SECONDS = 4e-7  # for each row
TRUTH_SECONDS = 5.4e-11  # for each query, row and number: the exact answers that a searcher is calibrated with

# Of one processor, to look for near-duplicates. By comparing every two: for each two rows and number; a minute at
# 100,000 x 512. By asking the searcher for the neighbours of each row: for each row, shard, root of a shard's rows (the
# size of a leaf) and number; 100,000 x 128 took 4.0 s, a million at most 1.8 times what this says
COMPARE_SECONDS = 1.2e-11
NEIGHBORS_SECONDS = 1.0e-9
_LANCE_CACHE_BYTES = 6 << 30  # what Lance keeps of its indices, by default

PROBE_PAIRS = 320
PROBE_SECONDS = 2.5  # for each stage, at most
_PROBE_SHARDS = 4
_MORE_ROWS = 7  # times the rows of the probe, to tell what a row takes from what a commit takes
_COUNTED_SHARDS = 200  # with more, so many are counted and the rest goes by its bytes

Bound = Stage | Literal["processors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What the sources hold. `pairs` is None when no shard says how many it has, and the probe must tell."""

    shards: int
    skipped: int
    layouts: dict[str, int]  # name -> shards
    bytes: int
    pairs: int | None
    is_estimate: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """Seconds that a stage takes for one pair, and how many of one processor."""

    seconds: float
    processor_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCosts:
    """What a pair costs on a machine, with a model: measured by a probe, or written down from one."""

    dim: int
    read: StageCost
    decode: StageCost  # by one thread; the build has several
    embed: StageCost
    write: StageCost
    row_bytes: float  # of the table, vector included
    caption_bytes: float
    source_bytes: float  # of a pair in its shard
    process_bytes: float  # of the process with its model, before any row
    bad_share: float = 0.0
    foreign_dim: int = 0  # of vectors that the pairs bring and that are not of the model's width
    measured_on: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a build will take on each of `machines` alike machines, each holding its share of the pairs."""

    pairs: int
    pairs_each: int
    machines: int
    workers: int
    ram: int
    recall: float
    structure: Structure
    bytes: dict[str, float]  # on disk of each: rows, searcher, word index, id index
    memory: dict[str, float]  # of each process: building, serving
    expected_recall: float  # 1 for exact; else what calibration sets out to reach, and says when it does not
    seconds: dict[str, float]  # pairs, searcher, word index, id index, calibration, duplicates
    stages: dict[str, float]  # seconds a pair: read, decode, embed, write; with all threads at work
    pairs_per_second: float
    bottleneck: Bound
    warnings: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> float:
        """On the disk of each machine."""
        return sum(self.bytes.values())

    @property
    def hours(self) -> float:
        """Until the slowest machine is done."""
        return sum(self.seconds.values()) / 3600

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "total_bytes": self.total_bytes, "hours": self.hours}


def plan_sources(
    sources: Sequence[str],
    embedder: Embedder,
    *,
    pairs: int | None = None,
    allow_partial: bool = False,
    keep: KeepImages | None = None,
    **wanted: Any,
) -> tuple[Count, UnitCosts, Plan]:
    """Count, probe and plan. `pairs` extrapolates to another number of them; `wanted` goes to `make_plan`."""
    with sources_blamed():
        shards, count = count_sources(sources, allow_partial=allow_partial)
        costs = probe(_spread(shards, _PROBE_SHARDS), embedder, keep=keep or KeepImages())
    good = count.pairs if count.pairs is not None else round(count.bytes / max(costs.source_bytes, 1.0))
    total = pairs if pairs is not None else max(1, round(good * (1 - costs.bad_share)))
    plan = make_plan(total, costs, **wanted)
    if costs.foreign_dim:
        warning = foreign_vectors(costs.foreign_dim, model=embedder.name, dim=costs.dim)
        plan = replace(plan, warnings=(*plan.warnings, warning))
    return count, costs, plan


def make_plan(
    pairs: int,
    costs: UnitCosts,
    *,
    ram: int | None = None,
    recall: float = DEFAULT_RECALL,
    workers: int | None = None,
    machines: int = 1,
    processors: int | None = None,
    kind: SearcherChoice = "auto",
) -> Plan:
    """Arithmetic alone: also for machines and numbers of pairs that are not at hand.

    `ram` is what a searcher may take on each machine, beside the process with its model and its blocks of rows.
    """
    if pairs < 1 or machines < 1:
        raise ConfigError(f"a plan needs at least one pair and one machine, got {pairs} and {machines}")
    ram = default_ram() if ram is None else ram
    processors = processors or usable_processors()
    workers = workers or processors
    each = math.ceil(pairs / machines)
    structure = choose_structure(each, costs.dim, ram=ram, kind=kind)
    stages = _stages(costs, workers)
    pair_seconds, bottleneck = _slowest(costs, stages, processors)
    has_index = each >= INDEX_ROWS
    sizes = {
        "rows": each * costs.row_bytes,
        "searcher": float(structure.disk_bytes),
        "word index": each * costs.caption_bytes * WORD_BYTES,
        "id index": each * ID_INDEX_BYTES if has_index else 0.0,
    }
    seconds = {
        "pairs": each * pair_seconds,
        "searcher": structure.build_seconds / processors,
        "word index": each * WORD_SECONDS / processors,
        "id index": each * ID_INDEX_SECONDS if has_index else 0.0,
        "calibration": _truth_seconds(structure) / processors,
        "duplicates": _duplicates_seconds(structure) / processors,
    }
    return Plan(
        pairs=pairs,
        pairs_each=each,
        machines=machines,
        workers=workers,
        ram=ram,
        recall=recall,
        structure=structure,
        bytes=sizes,
        memory={
            "building": costs.process_bytes + working_bytes(costs.dim) + structure.building_bytes,
            "serving": costs.process_bytes + structure.serving_bytes + _words_held(each * costs.caption_bytes),
        },
        expected_recall=1.0 if structure.kind == "exact" else recall,
        seconds=seconds,
        stages=stages,
        pairs_per_second=1 / pair_seconds,
        bottleneck=bottleneck,
        warnings=_warnings(structure, ram),
    )


# Counting


def count_sources(sources: Sequence[str], *, allow_partial: bool = False) -> tuple[list[Shard], Count]:
    """The shards of all sources, and how many pairs they hold. CorpusError when there is none to read."""
    shards: list[Shard] = []
    skipped: list[SkippedShard] = []
    for source in sources:
        for shard in read(source, allow_partial=allow_partial):
            if isinstance(shard, SkippedShard):
                skipped.append(shard)
            else:
                shards.append(shard)
    if not shards:
        why = f": {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise CorpusError(f"there is no shard to plan with in {', '.join(sources)}{why}")
    layouts: dict[str, int] = {}
    for shard in shards:
        layouts[shard.layout] = layouts.get(shard.layout, 0) + 1
    size = sum(shard.bytes for shard in shards)
    counted = _spread(shards, _COUNTED_SHARDS)
    known = [(pairs, shard.bytes) for shard in counted if (pairs := _pairs_in(shard)) is not None]
    pairs = None
    if known:
        pairs = sum(n for n, _ in known)
        if len(known) < len(shards):
            pairs = round(pairs * size / max(1, sum(b for _, b in known)))
    return shards, Count(
        shards=len(shards),
        skipped=len(skipped),
        layouts=layouts,
        bytes=size,
        pairs=pairs,
        is_estimate=len(known) < len(shards),
    )


def _pairs_in(shard: Shard) -> int | None:
    """What can be told without reading the samples; None when that is nothing."""
    if shard.is_img2dataset:
        return _successes(shard)
    parquet = [path for path in shard.files if path.endswith(".parquet")]
    if parquet:
        with suppress(DamagedTableError), open_table(shard.fs, parquet[0]) as table:
            return int(table.metadata.num_rows)
        return None
    images = sum(suffix_of(path) in IMAGE_SUFFIXES for path in shard.files)
    return images or None


def _successes(shard: Shard) -> int | None:
    """What img2dataset's stats say; its Parquet file beside a tar would count the failures too."""
    path = beside(next(iter(shard.files)), "_stats.json")
    if shard.layout == "img2dataset files":
        path = beside(dirname(next(iter(shard.files))), "_stats.json")
    try:
        with shard.fs.open(path, "rb") as file:
            return int(json.loads(file.read())["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Probing


@dataclass(slots=True)
class _Watch:
    """Wall and processor time since it was made."""

    started: float = field(default_factory=time.perf_counter)
    processor: float = field(default_factory=time.process_time)

    def cost(self, items: int) -> StageCost:
        """Of each of so many items."""
        seconds, processor = time.perf_counter() - self.started, time.process_time() - self.processor
        return StageCost(seconds=seconds / max(1, items), processor_seconds=processor / max(1, items))


def probe(shards: Sequence[Shard], embedder: Embedder, *, keep: KeepImages) -> UnitCosts:
    """Read, decode, embed and write some pairs of these shards, stage by stage, in about ten seconds at most.

    CorpusError when none of them is good.
    """
    watch = _Watch()
    samples = list(_first_samples(shards))
    read_cost = watch.cost(len(samples))
    watch = _Watch()
    outcomes = list(_for_a_while(lambda sample: decode_chunk([sample], embedder, keep)[0], samples))
    decode_cost = watch.cost(len(outcomes))
    good = [outcome for outcome in outcomes if isinstance(outcome, Decoded)]
    if not good:
        reason = next((o.reason for o in outcomes if isinstance(o, BadSample)), "they are empty")
        raise CorpusError(f"none of the first samples of {shards[0].source} could be used: {reason}")
    vectors, embed_cost = _embed(good, embedder)
    write_cost, row_bytes = _write(good, vectors, shards[0])
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return UnitCosts(
        dim=int(vectors.shape[1]),
        read=read_cost,
        decode=decode_cost,
        embed=embed_cost,
        write=write_cost,
        row_bytes=row_bytes,
        caption_bytes=float(np.mean([len(item.pair.caption.encode()) for item in good])),
        source_bytes=_source_bytes(pairs),
        process_bytes=_most_memory(),
        foreign_dim=max(item.foreign_dim for item in good),
        bad_share=1 - sum(isinstance(outcome, Decoded) for outcome in outcomes) / len(outcomes),
        measured_on=f"{len(good)} pairs of {len(shards)} shards on {usable_processors()} processors",
    )


def _most_memory() -> float:
    """The most bytes this process has held."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _first_samples(shards: Sequence[Shard]) -> Iterator[Sample]:
    started = time.perf_counter()
    for shard in shards:
        for sample in islice(shard.samples(), math.ceil(PROBE_PAIRS / len(shards))):
            yield sample
            if time.perf_counter() - started > PROBE_SECONDS:
                return


def _for_a_while(work: Any, items: Iterable[Any]) -> Iterator[Any]:
    """The results of as many items as `PROBE_SECONDS` allow, one at least."""
    started = time.perf_counter()
    for item in items:
        yield work(item)
        if time.perf_counter() - started > PROBE_SECONDS:
            return


def _embed(items: list[Decoded], embedder: Embedder) -> tuple[np.ndarray, StageCost]:
    """Vectors of as many as there is time for, in batches as a build has them; a network may warm up before."""
    prepared = [item for item in items if item.prepared is not None]
    if not prepared:  # they brought their vectors
        cost = StageCost(seconds=0.0, processor_seconds=0.0)
        return np.stack([item.vector for item in items if item.vector is not None]), cost
    rows = min(embedder.batch_rows(), max(1, len(prepared) // 2))
    batches = [prepared[start : start + rows] for start in range(0, len(prepared), rows)]

    def embed(batch: list[Decoded]) -> np.ndarray:
        return embedder.embed([item.prepared for item in batch if item.prepared is not None])

    embed(batches[0][: max(1, rows // 4)])
    watch = _Watch()
    vectors = np.concatenate(list(_for_a_while(embed, batches)))
    return vectors, watch.cost(len(vectors))


def _write(items: Sequence[Decoded], vectors: np.ndarray, shard: Shard) -> tuple[StageCost, float]:
    """Store the rows in a table that is thrown away: the time and the bytes of each; vectors serve in turn.

    A build commits many more rows at once, so what a commit takes by itself is left out of the time.
    """
    rows = [
        stored_pair(item, vectors[i % len(vectors)], source=shard.source, digest="0" * 32)
        for i, item in enumerate(items)
    ]
    record = _record(shard, len(rows))
    with tempfile.TemporaryDirectory(prefix="radt-plan-") as folder:
        store = PairStore.create(Path(folder), dim=vectors.shape[1])

        def commit(pairs: Sequence[StoredPair]) -> StageCost:
            watch = _Watch()
            store.commit_shards([(record, store.stage(pairs, record=record))], replaced=())
            return watch.cost(1)

        with store.lock():
            before = folder_bytes(Path(folder))
            few = commit(rows)
            size = (folder_bytes(Path(folder)) - before) / len(rows)
            many = commit(rows * (1 + _MORE_ROWS))
    more = _MORE_ROWS * len(rows)
    cost = StageCost(
        seconds=max(0.0, many.seconds - few.seconds) / more,
        processor_seconds=max(0.0, many.processor_seconds - few.processor_seconds) / more,
    )
    return cost, size


def _record(shard: Shard, pairs: int) -> ShardRecord:
    return ShardRecord(
        dataset=shard.dataset,
        source=shard.source,
        shard=shard.name,
        digest="0" * 32,
        stamp="0" * 32,
        pairs=pairs,
        bad=0,
        bytes=shard.bytes,
    )


def _source_bytes(pairs: Sequence[Pair]) -> float:
    """Of one pair in its shard: from tar offsets where there are any, else the image and a little."""
    ends: dict[str, tuple[int, int]] = {}
    for pair in pairs:
        if pair.image.offset is not None:
            last, number = ends.get(pair.shard, (0, 0))
            ends[pair.shard] = (max(last, pair.image.offset + (pair.image.size or 0)), number + 1)
    if ends:
        return sum(last for last, _ in ends.values()) / sum(number for _, number in ends.values())
    return float(np.mean([len(pair.encoded or b"") + 512 for pair in pairs])) if pairs else 0.0


# Arithmetic


def _stages(costs: UnitCosts, workers: int) -> dict[str, float]:
    """Seconds a pair when each stage has what it can use: one reader, one writer, many decoders."""
    seconds: dict[str, float] = {stage: getattr(costs, stage).seconds for stage in STAGES}
    seconds["decode"] /= workers
    return seconds


def _slowest(costs: UnitCosts, stages: dict[str, float], processors: int) -> tuple[float, Bound]:
    """Seconds a pair, and what keeps it from being faster: one stage, or that all of them share the processors."""
    slowest: Stage = max(STAGES, key=stages.__getitem__)
    together = sum(getattr(costs, stage).processor_seconds for stage in STAGES) / processors
    if together > 1.1 * stages[slowest]:
        busiest = max(STAGES, key=lambda stage: getattr(costs, stage).processor_seconds)
        return together, busiest if processors == 1 else "processors"
    return max(stages[slowest], together, 1e-9), slowest


def _words_held(caption_bytes: float) -> float:
    return min(WORD_MEMORY * caption_bytes, _LANCE_CACHE_BYTES)


def _truth_seconds(structure: Structure) -> float:
    if structure.kind == "exact":
        return 0.0
    return TRUTH_SECONDS * CALIBRATION_CAPTIONS * structure.rows * structure.dim


def _duplicates_seconds(structure: Structure) -> float:
    rows, dim = structure.rows, structure.dim
    if structure.kind == "exact":
        return COMPARE_SECONDS * rows * rows * dim if rows <= COMPARED_ROWS else 0.0
    return NEIGHBORS_SECONDS * rows * structure.shards * math.sqrt(rows / structure.shards) * dim


def _warnings(structure: Structure, ram: int) -> tuple[str, ...]:
    warnings = []
    if structure.serving_bytes > ram:
        warnings.append("the searcher does not fit in --ram; give more of it, or more --machines")
    if not structure.is_resident:
        warnings.append("single queries will be slow: every one loads all shards; --searcher lance answers them faster")
    return tuple(warnings)


def _spread(shards: list[Shard], num: int) -> list[Shard]:
    """At most so many of them, evenly from first to last."""
    if len(shards) <= num:
        return shards
    return [shards[i * (len(shards) - 1) // (num - 1)] for i in range(num)]
