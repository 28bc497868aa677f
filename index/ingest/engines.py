"""Engines: who turns shards into staged rows. The local one overlaps reading, decoding, embedding and writing.

An engine makes nothing visible; the build commits what it yields. The local one keeps the order of the shards, that on
Ray (`ray_engine.py`) yields them as they end.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float32

from index.embedder import Embedder, Measurable, Prepared
from index.ingest.decode import Decoded, KeepImages, bad, chunks, decode_chunk
from index.ingest.meter import Meter, Stage
from index.ingest.readers import Sample, Shard
from index.records import BadSample, ShardRecord, StoredPair
from index.search.sizes import processors
from index.store import PairStore, Staged

T = TypeVar("T")

STAGE_ROWS = 16_384  # rows held in memory before they go to disk; of those that have, the ids and keys are kept
STAGE_BYTES = 64 << 20  # of image copies and thumbnails, likewise
PENDING_BLOCKS = 3  # blocks of rows that wait for the disk
AHEAD_CHUNKS = 32  # chunks of samples read and decoded ahead of the network, and two for each decoding thread
LEFT_BATCHES = 1  # with the network while rows are put away and the next batch is gathered
LEFT_SHARDS = 32  # that have been read and wait for it
IDLE_SECONDS = 1.0  # without anything new from the reader, after which what is done is seen to
MEASURE_AFTER = 10.0  # seconds, of a build that is long enough to find out what the device could do at best

Outcomes = list[Decoded | BadSample]


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedShard:
    """A shard whose rows are ready and not yet visible."""

    record: ShardRecord
    rows: Staged  # of these, fewer pairs than the record says: without what was taken down before
    version: int  # of the table when reading began: removals after that may have been missed
    brought: int = 0  # pairs whose vectors came along


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShardWork:
    """A shard on its way: what it was when reading began; its samples follow as they come out of the decoders."""

    shard: Shard
    stamp: str
    digest: str


@dataclass(slots=True)
class _ShardInHand:
    """What has become of a shard."""

    work: _ShardWork
    version: int
    decoded: list[Decoded] = field(default_factory=list)  # to be embedded
    rows: list[StoredPair] = field(default_factory=list)  # to be written
    rows_bytes: int = 0
    bad: list[BadSample] = field(default_factory=list)
    writes: list[Future[Staged]] = field(default_factory=list)
    pairs: int = 0
    brought: int = 0  # samples with vectors of their own
    batches: int = 0  # with the network
    is_read: bool = False  # no more samples will come
    is_staged: bool = False  # all its rows are with the writer
    foreign_dim: int = 0  # of the vectors that could not be used


@dataclass(frozen=True, slots=True)
class _Batch:
    """Images with the network."""

    hand: _ShardInHand
    items: Sequence[Decoded]
    vectors: Future[Any]


def run_local(
    shards: Iterable[tuple[Shard, str, str]],
    *,
    embedder: Embedder,
    store: PairStore,
    claim: Callable[[Sequence[StoredPair]], None],
    on_batch: Callable[[int], None],
    on_idle: Callable[[], None] = lambda: None,
    workers: int | None = None,
    keep: KeepImages | None = None,
    meter: Meter | None = None,
) -> Generator[StagedShard, None, None]:
    """Stage shards, given with stamp and digest, on this machine: threads read and decode, one embeds, one writes.

    `on_batch` hears how many images go into the network, `meter` where the time goes, and `on_idle` is called when
    the reader has been silent for a while. `claim` sees the rows before they are written, and raises if one must not
    be. Images, vectors and rows are in memory as far as they are read ahead, and in a few blocks, however long a shard
    is; of all of it only the keys and the bad samples are kept. When something fails, the shards that are whole are
    yielded before it is raised.
    """
    workers = workers or processors()
    meter = meter or Meter()
    with ThreadPoolExecutor(workers) as threads, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as writer:
        decoders = _Decoders(threads, workers, embedder, keep or KeepImages())
        line = _Line(_Network(embedder, one, meter), store, writer, claim=claim, on_batch=on_batch, meter=meter)
        events = _prefetch(_events(shards, decoders), size=AHEAD_CHUNKS + 2 * workers)
        try:
            for event in _metered(events, meter):
                if isinstance(event, _Silence):
                    on_idle()
                elif isinstance(event, _ShardWork):
                    line.begin(event)
                elif event is None:
                    line.end()
                else:
                    line.take(_wait_for(event, decoders, meter))
                yield from line.finished()
            line.await_network()
            yield from line.finished(wait=True)
        except Exception:
            with suppress(Exception):  # the first error is the one to tell
                line.await_network()
            yield from line.finished(wait=True)
            raise
        finally:
            meter.stop()
            events.close()
            for pool in (threads, one):
                pool.shutdown(cancel_futures=True)


# Reading and decoding


class _Decoders:
    """The decoding threads, and whether they keep up."""

    def __init__(self, threads: ThreadPoolExecutor, workers: int, embedder: Embedder, keep: KeepImages):
        self._threads, self._workers, self._embedder, self._keep = threads, workers, embedder, keep
        self._mutex = threading.Lock()
        self._unfinished = 0
        self.has_all = False  # nothing more will be submitted

    def submit(self, samples: Sequence[Sample]) -> "Future[Outcomes]":
        """Decode a chunk in one of the threads."""
        self._count(1)
        future = self._threads.submit(decode_chunk, samples, self._embedder, self._keep)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def who_is_late(self) -> Stage:
        """Why a chunk is not there yet: the threads have more than they can do, or the reader feeds them too slowly."""
        return "decode" if self.has_all or self._unfinished > self._workers else "read"

    def _count(self, change: int) -> None:
        with self._mutex:
            self._unfinished += change


def _events(
    shards: Iterable[tuple[Shard, str, str]], decoders: _Decoders
) -> Iterator["_ShardWork | Future[Outcomes] | None"]:
    """A shard, its samples as they are being decoded, None at its end; then the next shard."""
    for shard, stamp, digest in shards:
        yield _ShardWork(shard=shard, stamp=stamp, digest=digest)
        for chunk in chunks(shard.samples()):
            yield decoders.submit(chunk)
        yield None
    decoders.has_all = True


def _metered(events: Iterator[T], meter: Meter) -> Iterator[T]:
    """The same; the time until the next one is there is the reader's."""
    meter.enter("read")
    for event in events:
        yield event
        meter.enter("read")


def _wait_for(chunk: "Future[Outcomes]", decoders: _Decoders, meter: Meter) -> Outcomes:
    if not chunk.done():
        meter.enter(decoders.who_is_late())
    return chunk.result()


# Embedding and writing


class _Network:
    """The embedder in a thread of its own, so that it is at work while rows are put away."""

    def __init__(self, embedder: Embedder, thread: ThreadPoolExecutor, meter: Meter):
        self._embedder, self._thread, self._meter = embedder, thread, meter
        self._is_measured = False

    @cached_property
    def batch_rows(self) -> int:
        """How many images are best embedded at once."""
        return self._embedder.batch_rows()

    def submit(self, prepared: Sequence[Prepared]) -> "Future[Any]":
        """Their vectors, in time."""
        return self._thread.submit(self._embed, prepared)

    def _embed(self, prepared: Sequence[Prepared]) -> Float32[np.ndarray, "n d"]:
        if not self._is_measured and self._meter.progress.seconds > MEASURE_AFTER:
            self._is_measured = True
            if isinstance(self._embedder, Measurable):
                self._meter.most_images_per_second = self._embedder.most_images_per_second()
        return self._embedder.embed(prepared)


class _Line:
    """Takes the samples of one shard after the other, embeds them in batches and hands blocks of rows to the writer."""

    def __init__(
        self,
        network: _Network,
        store: PairStore,
        writer: ThreadPoolExecutor,
        *,
        claim: Callable[[Sequence[StoredPair]], None],
        on_batch: Callable[[int], None],
        meter: Meter,
    ):
        self._network, self._store, self._writer = network, store, writer
        self._claim, self._on_batch, self._meter = claim, on_batch, meter
        self._hand: _ShardInHand | None = None
        self._batches: deque[_Batch] = deque()
        self._ended: deque[_ShardInHand] = deque()
        self._pending: deque[Future[Staged]] = deque()

    def begin(self, work: _ShardWork) -> None:
        """What is taken from now on belongs to this shard."""
        self._hand = _ShardInHand(work=work, version=self._store.version)

    def take(self, outcomes: Outcomes) -> None:
        """More samples of the shard; embedded and written as soon as there are enough of them."""
        hand = self._shard()
        for outcome in outcomes:
            if isinstance(outcome, BadSample):
                hand.bad.append(outcome)
                continue
            hand.foreign_dim = outcome.foreign_dim or hand.foreign_dim
            if outcome.prepared is None:
                hand.brought += 1
                self._keep(hand, [outcome], [outcome.vector])
            else:
                hand.decoded.append(outcome)
        while hand.decoded and len(hand.decoded) >= self._network.batch_rows:
            self._embed(hand)
        self._write_due(hand)

    def end(self) -> None:
        """The shard has no more samples. Batches start anew with every shard, so that a resumed build repeats them."""
        hand, self._hand = self._shard(), None
        while hand.decoded:
            self._embed(hand)
        hand.is_read = True
        self._ended.append(hand)
        self._write_due(hand)
        if len(self._ended) > LEFT_SHARDS:  # those behind it need no network: they must not pile up
            self.await_network()

    def await_network(self, *, but: int = 0) -> None:
        """Put away what the network has made, until at most `but` batches are with it."""
        while len(self._batches) > but:
            self._meter.enter("embed")
            batch = self._batches.popleft()
            vectors = batch.vectors.result()
            batch.hand.batches -= 1
            self._meter.images += len(batch.items)
            self._keep(batch.hand, batch.items, list(vectors))
            self._write_due(batch.hand)

    def finished(self, *, wait: bool = False) -> Iterator[StagedShard]:
        """The ended shards whose rows are ready, in order; with `wait`, all whose rows the writer has."""
        while not wait and self._batches and self._batches[0].vectors.done():
            self.await_network(but=len(self._batches) - 1)
        while self._ended and self._ended[0].is_staged:
            if not wait and not all(write.done() for write in self._ended[0].writes):
                return
            self._meter.enter("write")
            hand = self._ended.popleft()
            rows = Staged.together(write.result() for write in hand.writes)
            self._meter.shards += 1
            yield StagedShard(record=_record(hand), rows=rows, version=hand.version, brought=hand.brought)

    def _shard(self) -> _ShardInHand:
        assert self._hand is not None, "samples come after their shard"
        return self._hand

    def _embed(self, hand: _ShardInHand) -> None:
        rows = self._network.batch_rows
        items, hand.decoded = hand.decoded[:rows], hand.decoded[rows:]
        self._on_batch(len(items))
        vectors = self._network.submit([item.prepared for item in items if item.prepared is not None])
        self._batches.append(_Batch(hand, items, vectors))
        hand.batches += 1
        self.await_network(but=LEFT_BATCHES)

    def _keep(self, hand: _ShardInHand, items: Sequence[Decoded], vectors: Sequence[np.ndarray | None]) -> None:
        self._meter.enter("write")
        for item, vector in zip(items, vectors, strict=True):
            if vector is None or not np.isfinite(vector).all():
                hand.bad.append(bad(item.pair, _why_no_vector(item)))
                continue
            hand.rows.append(stored_pair(item, vector, source=hand.work.shard.source, digest=hand.work.digest))
            hand.rows_bytes += len(item.copy or b"") + len(item.thumbnail or b"")
            hand.pairs += 1
            self._meter.pairs += 1

    def _write_due(self, hand: _ShardInHand) -> None:
        """Write once there is a block of rows, and when nothing more will come."""
        is_end = hand.is_read and not hand.batches
        if is_end or len(hand.rows) >= STAGE_ROWS or hand.rows_bytes >= STAGE_BYTES:
            self._write(hand, is_end=is_end)
            hand.is_staged = is_end

    def _write(self, hand: _ShardInHand, *, is_end: bool) -> None:
        """Hand the rows to the writing thread, the last with the ledger entry, once it has few enough waiting."""
        self._meter.enter("write")
        self._claim(hand.rows)
        while len(self._pending) >= PENDING_BLOCKS or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        record, bad_samples = (_record(hand), hand.bad) if is_end else (None, ())
        write = self._writer.submit(self._store.stage, hand.rows, record=record, bad=bad_samples)
        hand.writes.append(write)
        self._pending.append(write)
        hand.rows, hand.rows_bytes = [], 0


def _why_no_vector(item: Decoded) -> str:
    if item.prepared is None:
        return "its vector is not finite"
    return "the model gives no finite vector for this image"


def stored_pair(item: Decoded, vector: Float32[np.ndarray, " d"], *, source: str, digest: str) -> StoredPair:
    """The row of a pair whose vector is known."""
    pair = item.pair
    return StoredPair(
        id=pair.id,
        dataset=pair.dataset,
        source=source,
        shard=pair.shard,
        digest=digest,
        key=pair.key,
        caption=pair.caption,
        image=pair.image,
        sha256=item.sha256,
        width=item.width,
        height=item.height,
        dhash=item.dhash,
        metadata=pair.metadata,
        vector=vector,
        image_bytes=item.copy,
        thumbnail=item.thumbnail,
    )


def _record(hand: _ShardInHand) -> ShardRecord:
    return ShardRecord(
        dataset=hand.work.shard.dataset,
        source=hand.work.shard.source,
        shard=hand.work.shard.name,
        digest=hand.work.digest,
        stamp=hand.work.stamp,
        pairs=hand.pairs,
        bad=len(hand.bad),
        bytes=hand.work.shard.bytes,
        layout=hand.work.shard.layout,
        foreign_dim=hand.foreign_dim,
    )


class _Silence:
    """Nothing has come for `IDLE_SECONDS`."""


def _prefetch(items: Iterator[T], *, size: int) -> Generator[T | _Silence, None, None]:
    """The same items, made by a thread that is at most `size` ahead. Closing it stops the thread."""
    waiting: queue.Queue[_Item[T] | None] = queue.Queue(size)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, waiting, stop), name="read-shards", daemon=True)
    thread.start()
    try:
        while True:
            try:
                entry = waiting.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                yield _Silence()
                continue
            if entry is None:
                return
            if entry.error is not None:
                raise entry.error
            yield entry.items[0]
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    """What the reading thread hands over: one item, or the error that ended it."""

    items: tuple[T, ...] = ()
    error: BaseException | None = None


def _fill(items: Iterator[T], waiting: "queue.Queue[_Item[T] | None]", stop: threading.Event) -> None:
    try:
        for item in items:
            _put(_Item((item,)), waiting, stop)
            if stop.is_set():
                return
        _put(None, waiting, stop)
    except BaseException as error:
        _put(_Item(error=error), waiting, stop)


def _put(entry: "_Item[T] | None", waiting: "queue.Queue[_Item[T] | None]", stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            waiting.put(entry, timeout=0.1)
        except queue.Full:
            continue
        return
