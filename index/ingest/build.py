"""Build: sources to a searchable knowledge base. Read, decode, embed and write overlap; a shard lands whole or not.

Kill it at any moment and run it again: shards in the ledger are passed over, the one in hand is made again. What
decides is in the table itself (`index/ingest/ledger.py`); reader `index/ingest/readers.py`, overlap `engines.py`.
"""

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from index.atomic import new_file, one_sentence
from index.errors import ConfigError, CorpusError, KnowledgeBaseError
from index.ingest.brought import doubt
from index.ingest.decode import KeepImages, foreign_vectors
from index.ingest.engines import StagedShard, run_local
from index.ingest.ledger import Ledger
from index.ingest.meter import Meter, Progress, Stage
from index.ingest.parts import TURN_SECONDS, DeferredClaims, Part, admitted
from index.ingest.readers import Layout, Shard, SkippedShard, check_source, read
from index.ingest.sources import sources_blamed
from index.knowledge_base import KnowledgeBase, SearcherChoice
from index.records import ShardRecord, shard_title
from index.search.searcher import SearcherManifest
from index.snapshots import has_snapshot, move_newest
from index.stats import folder_bytes
from index.store import PairStore

QUARANTINE = "quarantine.jsonl"
JUDGED_FROM = 10_000  # samples of a build that say whether the rest is worth reading
GROUP_ROWS = 16_384  # one commit for so many rows, or bytes in memory, or after so long: each commit costs the same
GROUP_BYTES = 64 << 20
GROUP_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """How to build."""

    dataset: str | None = None  # None: named after the source's folder
    searcher: SearcherChoice = "auto"
    recall: float | None = None  # of the searcher; None: as it was built before, 0.95 at first
    min_recall: float | None = None  # below which the build fails once the searcher is measured; None: it never does
    ram: int | None = None  # bytes the searcher may take; None: as before, most of the machine's at first
    allow_partial: bool = False  # take shards that are not complete
    max_bad_fraction: float = 0.1  # of the samples of these sources
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None  # HOST:PORT; None: the cluster that Ray finds, or this machine
    workers: int | None = None  # decoding threads, or processes on Ray; None: as many as there are processors for
    duplicates: bool | None = None  # find which pictures are alike; None: as before, at first yes
    keep: KeepImages = field(default_factory=KeepImages)  # copies and thumbnails of the images
    seed: int = 0
    part: Part | None = None  # only the shards that fall to it, and no searcher
    wait: float = 0.0  # seconds to wait for another writer
    prune: bool = False  # take out the pairs of shards that are no longer in these sources

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction is a share of 1, got {self.max_bad_fraction}")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise ConfigError(f"recall is a share of 1, got {self.recall}")
        if self.min_recall is not None and not 0 < self.min_recall <= (self.recall or 1):
            raise ConfigError(f"min_recall is a share of 1, and at most what recall aims at, got {self.min_recall}")
        if self.min_recall is not None and self.part is not None:
            raise ConfigError("min_recall judges the searcher, so it is for the build without --part that makes it")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if not self.wait >= 0:
            raise ConfigError(f"wait is a number of seconds, 0 or more, got {self.wait}")
        if self.prune and self.part is not None:
            raise ConfigError("pruning looks at all shards, so it is for a build without --part")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What a build did. `quarantined` and `pairs_in_sources` count these sources, whenever they were read."""

    kb: str
    pairs_total: int
    pairs_added: int  # that were not there before
    pairs_replaced: int  # that were, and were read again because their shard has changed
    pairs_in_sources: int
    pairs_forbidden: int  # read now and turned away: their images were taken down with `remove --same-image`
    quarantined: int
    shards_done: int
    shards_unchanged: int
    shards_skipped: int
    shards_pruned: int
    layouts: dict[Layout, int]  # how the sources are laid out: shards of each layout
    skipped: tuple[SkippedShard, ...]
    seconds: float
    pairs_per_second: float
    stages: dict[Stage, float]  # shares of the time until all is read in, by what was waited for
    bottleneck: Stage | None
    matrix_share: float | None  # of the device's matrix rate, as `Progress` has it; None after a short build
    bytes: int  # of the knowledge base on disk
    searcher: str | None  # None after a part: the searcher is built when all of them are in
    recall_at_10: float | None
    warning: str  # a sentence when the searcher does not reach the recall that was asked for
    notes: tuple[str, ...]  # sentences on what a user may not expect
    snapshot: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(slots=True)
class _Tally:
    unchanged: int = 0
    done: int = 0
    added: int = 0
    replaced: int = 0
    pruned: int = 0
    forbidden: int = 0
    brought: list[ShardRecord] = field(default_factory=list)  # shards read now, with vectors of their own
    unchanged_pairs: int = 0
    unchanged_bad: int = 0
    touched: list[ShardRecord] = field(default_factory=list)  # unchanged, with their new stamps
    layouts: Counter[Layout] = field(default_factory=Counter)
    skipped: list[SkippedShard] = field(default_factory=list)

    def keep(self, record: ShardRecord) -> None:
        """Count a shard that is as it was."""
        self.unchanged += 1
        self.unchanged_pairs += record.pairs
        self.unchanged_bad += record.bad


def build(
    kb: KnowledgeBase,
    sources: Sequence[str],
    config: BuildConfig,
    *,
    on_batch: Callable[[int], None] = lambda images: None,
    on_shard: Callable[[ShardRecord], None] = lambda record: None,
    on_wait: Callable[[str], None] = lambda sentence: None,
    meter: Meter | None = None,
) -> BuildReport:
    """Bring all pairs of `sources` into `kb`, then fit its searcher and its word index, and tag the outcome.

    `on_batch` hears how many images go into the network, `on_shard` of every shard that lands, `on_wait` of another
    process that is writing. CorpusError when a source cannot be read, when more than `max_bad_fraction` of the samples
    are bad (of all, or after any shard from `JUDGED_FROM` samples on), or when none is good. KnowledgeBaseError when
    the searcher misses `min_recall`. What has landed stays.
    """
    started = time.perf_counter()
    meter = meter or Meter()
    check_sources(sources, kb.directory)
    tally = _Tally()
    with admitted(kb.store, config.part, wait=config.wait, on_wait=on_wait), _strict_images(), sources_blamed():
        ledger = Ledger(kb.store)
        claims = DeferredClaims(kb.store, ledger) if config.part else None
        todo = _changed_shards(sources, config, ledger, tally, meter=meter)
        landing = _Landing(kb.store, ledger, tally, on_shard, claims=claims)
        staged = _engine(config)(
            todo,
            embedder=kb.embedder,
            store=kb.store,
            claim=claims.note if claims else ledger.claim,
            on_batch=on_batch,
            on_idle=landing.commit_due,
            workers=config.workers,
            keep=config.keep,
            meter=meter,
        )
        quality = _Quality(ledger.unmet(sources), config.max_bad_fraction, tally)
        with closing(staged):  # when landing fails, reading and decoding stop at once
            try:
                for shard in staged:
                    landing.take(shard)
                    if quality.is_hopeless(shard.record):
                        break
            finally:  # what is whole lands, also when the build is interrupted
                landing.commit()
        if quality.complaint:
            _write_quarantine(kb.store)
            raise CorpusError(quality.complaint)
        meter.note = "all is read in; making it searchable"
        searcher = _finish(kb, sources, config, ledger=ledger, tally=tally) if config.part is None else None
        _check_recall(searcher, config)
        notes = _notes(kb, config, ledger, tally)
        seconds = time.perf_counter() - started
        return _report(kb, ledger, tally, seconds=seconds, progress=meter.progress, searcher=searcher, notes=notes)


def _report(
    kb: KnowledgeBase,
    ledger: Ledger,
    tally: _Tally,
    *,
    seconds: float,
    progress: Progress,
    searcher: SearcherManifest | None,
    notes: tuple[str, ...],
) -> BuildReport:
    """What was done; made while nobody else may delete what it reads."""
    return BuildReport(
        kb=str(kb.directory),
        pairs_total=kb.store.count(),
        pairs_added=tally.added,
        pairs_replaced=tally.replaced,
        pairs_in_sources=sum(record.pairs for record in ledger.met()),
        pairs_forbidden=tally.forbidden,
        quarantined=sum(record.bad for record in ledger.met()),
        shards_done=tally.done,
        shards_unchanged=tally.unchanged,
        shards_skipped=len(tally.skipped),
        shards_pruned=tally.pruned,
        layouts=dict(tally.layouts),
        skipped=tuple(tally.skipped),
        seconds=round(seconds, 3),
        pairs_per_second=round((tally.added + tally.replaced) / seconds, 3),
        stages={stage: round(share, 3) for stage, share in progress.stages.items()},
        bottleneck=progress.bottleneck,
        matrix_share=None if progress.matrix_share is None else round(progress.matrix_share, 3),
        bytes=folder_bytes(kb.directory),
        searcher=searcher.kind if searcher else None,
        recall_at_10=searcher.recall_at_10 if searcher else None,
        warning=searcher.warning if searcher else "",
        notes=notes,
        snapshot=kb.store.version,
    )


def _finish(
    kb: KnowledgeBase, sources: Sequence[str], config: BuildConfig, *, ledger: Ledger, tally: _Tally
) -> SearcherManifest:
    """What follows when all shards are in."""
    if config.prune:
        tally.pruned = _prune(kb.store, ledger, sources, tally)
    _write_quarantine(kb.store)
    _check_quality(kb.store, ledger.met(), config, tally)
    is_changed = bool(tally.done or tally.pruned) or not has_snapshot(kb.store)
    kb.store.restamp(tally.touched)  # so that the next build need not read them to know
    searcher = kb.build_search(
        config.searcher,
        seed=config.seed,
        may_lag=True,
        duplicates=config.duplicates,
        recall=config.recall,
        ram=config.ram,
    )
    if is_changed:
        kb.tag_build()
    else:
        move_newest(kb.store)
    return searcher


def _notes(kb: KnowledgeBase, config: BuildConfig, ledger: Ledger, tally: _Tally) -> tuple[str, ...]:
    """What was done otherwise than a user may think, and what can be done about it."""
    notes = []
    foreign = [record for record in ledger.met() if record.foreign_dim]
    if foreign:
        widths = " and ".join(str(width) for width in sorted({record.foreign_dim for record in foreign}))
        notes.append(foreign_vectors(widths, model=kb.manifest.model, dim=kb.manifest.dim))
    if doubted := doubt(kb.store, kb.embedder, tally.brought):
        notes.append(doubted)
    if (config.keep.copy or config.keep.thumbnail) and tally.unchanged:
        notes.append(
            f"{tally.unchanged} unchanged shards keep what they have: --copy-images and --thumbnails are for shards "
            "that are read now; to have them for all pairs, build in another folder"
        )
    if twice := ledger.named_otherwise():
        notes.append(
            f"dataset {twice[0].dataset!r} has {len(twice)} of these shards too, so that their pairs are here twice; "
            "`radt index remove --dataset NAME` takes a dataset out"
        )
    if config.part is not None:
        nothing = "" if tally.layouts or tally.skipped else ", no shard of these sources falls to it"
        notes.append(
            f"part {config.part} is in{nothing}; after the last one, the same command without --part makes the searcher"
        )
    return tuple(notes)


def _engine(config: BuildConfig) -> Callable[..., Generator[StagedShard, None, None]]:
    """Who turns shards into staged rows."""
    if config.engine == "local":
        return run_local
    from index.ingest.ray_engine import run_ray

    return partial(run_ray, address=config.ray_address)


class _Landing:
    """Gathers staged shards and makes them visible in groups: a commit for every tiny shard would dominate a build."""

    def __init__(
        self,
        store: PairStore,
        ledger: Ledger,
        tally: _Tally,
        on_shard: Callable[[ShardRecord], None],
        *,
        claims: DeferredClaims | None = None,
    ) -> None:
        self._store, self._ledger, self._tally, self._on_shard = store, ledger, tally, on_shard
        self._claims = claims
        self._group: list[StagedShard] = []
        self._rows = self._bytes = 0
        self._since = 0.0

    def take(self, shard: StagedShard) -> None:
        """Take one more shard."""
        if not self._group:
            self._rows = self._bytes = 0
            self._since = time.monotonic()
        self._group.append(shard)
        self._rows += shard.record.pairs + shard.record.bad
        self._bytes += shard.rows.bytes_in_memory
        self.commit_due()

    def commit_due(self) -> None:
        """Commit the group if it is large enough, or has waited long enough."""
        is_large = self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES
        if is_large or time.monotonic() - self._since >= GROUP_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make the shards of the group visible, all at once."""
        group, self._group = self._group, []
        if not group:
            return
        with self._store.lock(TURN_SECONDS):  # a whole build holds it already, a part waits for its turn
            if self._claims is not None:
                group = self._claims.make(group)
            replaced = [shard.record for shard in group if self._ledger.has(shard.record)]
            if group:
                self._store.commit_shards([(shard.record, shard.rows) for shard in group], replaced=replaced)
        for shard in group:
            self._ledger.enter(shard.record)
            self._tally.done += 1
            if shard.brought:
                self._tally.brought.append(shard.record)
            known = min(self._ledger.replaced(shard.record), shard.rows.pairs)
            self._tally.replaced += known
            self._tally.forbidden += shard.rows.forbidden
            self._tally.added += shard.rows.pairs - known
            self._on_shard(shard.record)


def _changed_shards(
    sources: Sequence[str], config: BuildConfig, ledger: Ledger, tally: _Tally, *, meter: Meter
) -> Iterator[tuple[Shard, str, str]]:
    """Shards that the ledger does not have as they are now, with stamp and digest taken before they are read."""
    for source in sources:
        listed = read(source, dataset=config.dataset, allow_partial=config.allow_partial, on_listed=meter.expect)
        for shard in listed:
            meter.expect(-1)  # until it turns out to be work
            if config.part is not None and not config.part.has(shard.name):
                continue
            if isinstance(shard, SkippedShard):
                tally.skipped.append(shard)
                continue
            if not ledger.meet(shard):
                continue
            tally.layouts[shard.layout] += 1
            record = ledger.find(shard)
            stamp = shard.stamp
            is_same_place = record is not None and record.source == shard.source
            if is_same_place and record is not None and record.stamp == stamp:
                tally.keep(record)
                continue
            is_far = config.engine == "ray" and not is_same_place  # nothing to compare with: who reads it takes it
            digest = "" if is_far else shard.digest()
            if is_same_place and record is not None and record.digest == digest:
                tally.keep(record)
                tally.touched.append(replace(record, stamp=stamp))
                continue
            meter.expect(1)
            yield shard, stamp, digest


def _prune(store: PairStore, ledger: Ledger, sources: Sequence[str], tally: _Tally) -> int:
    """Take out shards that whole sources no longer have; how many. A shard that is not complete yet is still there."""
    waiting = {shard.name for shard in tally.skipped}
    gone = [record for record in ledger.unmet(sources) if record.shard not in waiting]
    store.drop_shards(gone)
    return len(gone)


def _check_quality(store: PairStore, records: Sequence[ShardRecord], config: BuildConfig, tally: _Tally) -> None:
    pairs, bad = sum(record.pairs for record in records), sum(record.bad for record in records)
    if not records and tally.skipped:
        first = tally.skipped[0]
        raise CorpusError(
            f"none of the {len(tally.skipped)} shards is complete ({first.name}: {first.reason}); wait for them, or "
            "take what there is with --allow-partial"
        )
    if pairs == 0:
        raise CorpusError(
            f"no sample of {bad} could be used{_first_reason(store, records)}; `radt index stats --quarantine` says "
            "why for each"
        )
    if bad > config.max_bad_fraction * (pairs + bad):
        share = bad / (pairs + bad)
        raise CorpusError(
            f"{bad} of {pairs + bad} samples are bad, a share of {share:.3f} above --max-bad-fraction "
            f"{config.max_bad_fraction}; `radt index stats --quarantine` says why for each"
        )


def _check_recall(searcher: SearcherManifest | None, config: BuildConfig) -> None:
    if searcher is not None and config.min_recall is not None and searcher.recall_at_10 < config.min_recall:
        raise KnowledgeBaseError(
            f"the searcher finds {searcher.recall_at_10:.3f} of the true ten, below --min-recall {config.min_recall}; "
            f"all pairs are in and it serves them, and a larger --recall (it was {searcher.target_recall}), more --ram "
            "or --searcher exact finds more"
        )


class _Quality:
    """Judges the sources while they are read: `earlier` are the ledger's entries of them, from before this build.

    These are of shards that are still to come, or that have been mended or deleted since, so too many samples must be
    bad with them and without them.
    """

    def __init__(self, earlier: Sequence[ShardRecord], max_bad_fraction: float, tally: _Tally) -> None:
        self._earlier = {(record.dataset, record.shard): record for record in earlier}
        self._most = max_bad_fraction
        self._tally = tally
        self._pairs, self._bad = sum(record.pairs for record in earlier), sum(record.bad for record in earlier)
        self._read_pairs = self._read_bad = 0
        self.complaint = ""

    def is_hopeless(self, record: ShardRecord) -> bool:
        """Whether too many samples are bad, with this shard, of enough that have been read."""
        before = self._earlier.pop((record.dataset, record.shard), None)
        self._pairs += record.pairs - (before.pairs if before else 0)
        self._bad += record.bad - (before.bad if before else 0)
        self._read_pairs += record.pairs
        self._read_bad += record.bad
        share = _share(self._bad, self._pairs)
        met = _share(self._read_bad + self._tally.unchanged_bad, self._read_pairs + self._tally.unchanged_pairs)
        if self._read_pairs + self._read_bad >= JUDGED_FROM and min(share, met) > self._most:
            self.complaint = (
                f"{self._bad} of the {self._pairs + self._bad} samples so far are bad, a share of {share:.3f} above "
                f"--max-bad-fraction {self._most}, so no more are read; `radt index stats --quarantine` says why "
                "for each, and with a larger fraction the same command goes on"
            )
        return bool(self.complaint)


def _share(bad: int, good: int) -> float:
    return bad / max(bad + good, 1)


def _first_reason(store: PairStore, records: Sequence[ShardRecord]) -> str:
    shards = [record.shard for record in records if record.bad]
    name = shards[0].replace("'", "''") if shards else ""
    bad = store.bad_samples(f"shard = '{name}'", limit=1)
    return f" (in {shard_title(bad[0].shard)}: {bad[0].reason})" if bad else ""


def _write_quarantine(store: PairStore) -> None:
    """The quarantine as a file, for people and scripts; the rows of the table are what counts."""
    path = store.directory / QUARANTINE
    if store.count_bad() or path.exists():
        lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in store.each_bad_sample())
        with (
            one_sentence(store.directory),
            new_file(path) as partial,
            partial.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(lines)


def check_sources(sources: Sequence[str], directory: Path) -> None:
    """See before any work is done that every source is there and that the knowledge base does not lie in one of them.

    There it would be read as a part of the source, and sources are never written to.
    """
    if not sources:
        raise ConfigError("there is nothing to build from; name at least one source")
    for source in sources:
        check_source(source)
        path = Path(source)
        if path.is_dir() and directory.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"the knowledge base {directory} lies inside the source {source}; put it elsewhere")


@contextmanager
def _strict_images() -> Iterator[None]:
    """Pillow only warns of an image that is large enough to be a bomb; here it is a bad sample like the others."""
    import PIL.Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        yield
