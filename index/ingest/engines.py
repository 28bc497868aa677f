"""Engines: who turns shards into staged rows. The local one overlaps reading, decoding, embedding and writing.

An engine yields shards in the order given and makes nothing visible; the build commits what it yields.
"""

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float32

from index.embedder import Embedder, decode_image
from index.errors import CorpusError
from index.ingest.readers import Shard
from index.records import BadSample, Pair, ShardRecord, StoredPair
from index.store import PairStore

T = TypeVar("T")

STAGE_ROWS = 16_384  # rows held in memory before they go to disk, so that a shard may be of any length
EMBED_ROWS = 64  # rows embedded at once; batches start anew with every shard, so that a resumed build repeats them


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedShard:
    """A shard whose rows are on disk and not yet visible."""

    record: ShardRecord
    fragments: Sequence[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    """A pair whose image could be decoded, ready for the network."""

    pair: Pair
    prepared: Float32[np.ndarray, "c h w"]
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShardWork:
    """A shard on its way: what it was when reading began, and its samples as they come out of the decoders."""

    shard: Shard
    stamp: str
    digest: str


@dataclass(slots=True)
class _ShardInHand:
    """What has become of the shard in hand."""

    work: _ShardWork
    decoded: list[_Decoded] = field(default_factory=list)
    rows: list[StoredPair] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    writes: list[Future[list[Any]]] = field(default_factory=list)
    pairs: int = 0


def run_local(
    shards: Iterable[tuple[Shard, str, str]],
    *,
    embedder: Embedder,
    store: PairStore,
    claim: Callable[[Sequence[StoredPair]], None],
    on_batch: Callable[[int], None],
    workers: int | None = None,
) -> Iterator[StagedShard]:
    """Stage shards, given with stamp and digest, on this machine: threads decode, one embeds, one writes.

    `on_batch` hears how many images go into the network. `claim` sees the rows before they are written, and raises if
    one must not be. Memory is bounded by the queue and by a block of rows, not by the shards.
    """
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(1) as writer:
        events = _prefetch(_events(shards, decoders, embedder), size=EMBED_ROWS * 2 + workers)
        try:
            hand: _ShardInHand | None = None
            for event in events:
                if isinstance(event, _ShardWork):
                    hand = _ShardInHand(work=event)
                    continue
                assert hand is not None, "samples come after their shard"
                is_end = event is None
                if event is not None:
                    _take(event.result(), hand)
                if is_end or len(hand.decoded) >= EMBED_ROWS:
                    on_batch(len(hand.decoded))
                    _embed(hand, embedder)
                if is_end or len(hand.rows) >= STAGE_ROWS:
                    claim(hand.rows)
                    _write(hand, writer, store, is_end=is_end)
                if is_end:
                    yield StagedShard(record=_record(hand), fragments=[f for w in hand.writes for f in w.result()])
        finally:
            events.close()
            decoders.shutdown(cancel_futures=True)


def _events(
    shards: Iterable[tuple[Shard, str, str]], decoders: ThreadPoolExecutor, embedder: Embedder
) -> Iterator[_ShardWork | Future[_Decoded | BadSample] | None]:
    """A shard, its samples as they are being decoded, None at its end; then the next shard."""
    for shard, stamp, digest in shards:
        yield _ShardWork(shard=shard, stamp=stamp, digest=digest)
        for sample in shard.samples():
            yield decoders.submit(_decode, sample, embedder)
        yield None


def _decode(sample: Pair | BadSample, embedder: Embedder) -> _Decoded | BadSample:
    if isinstance(sample, BadSample):
        return sample
    try:
        image = decode_image(sample.encoded)
    except CorpusError as error:
        return BadSample(shard=sample.shard, key=sample.key, offset=sample.image.offset, reason=str(error))
    return _Decoded(
        pair=sample,
        prepared=embedder.prepare(image),
        sha256=sha256(sample.encoded).hexdigest(),
        width=image.width,
        height=image.height,
    )


def _take(outcome: _Decoded | BadSample, hand: _ShardInHand) -> None:
    if isinstance(outcome, BadSample):
        hand.bad.append(outcome)
    else:
        hand.decoded.append(outcome)


def _embed(hand: _ShardInHand, embedder: Embedder) -> None:
    vectors = embedder.embed([item.prepared for item in hand.decoded])
    for item, vector in zip(hand.decoded, vectors, strict=True):
        pair = item.pair
        if not np.isfinite(vector).all():
            reason = "the model gives no finite vector for this image"
            hand.bad.append(BadSample(shard=pair.shard, key=pair.key, offset=pair.image.offset, reason=reason))
            continue
        hand.pairs += 1
        hand.rows.append(_row(item, hand.work, vector))
    hand.decoded = []


def _write(hand: _ShardInHand, writer: ThreadPoolExecutor, store: PairStore, *, is_end: bool) -> None:
    """Hand the rows to the writing thread, the last with the ledger entry; at most two blocks wait for the disk."""
    record, bad = (_record(hand), hand.bad) if is_end else (None, ())
    hand.writes.append(writer.submit(store.stage, hand.rows, record=record, bad=bad))
    hand.rows = []
    for write in hand.writes[:-2]:
        write.result()


def _row(item: _Decoded, work: _ShardWork, vector: Float32[np.ndarray, " d"]) -> StoredPair:
    return StoredPair(
        id=item.pair.id,
        dataset=item.pair.dataset,
        source=work.shard.source,
        shard=item.pair.shard,
        digest=work.digest,
        key=item.pair.key,
        caption=item.pair.caption,
        image=item.pair.image,
        sha256=item.sha256,
        width=item.width,
        height=item.height,
        metadata=item.pair.metadata,
        vector=vector,
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
    )


def _prefetch(items: Iterator[T], *, size: int) -> Generator[T, None, None]:
    """The same items, made by a thread that is at most `size` ahead. Closing it stops the thread."""
    waiting: queue.Queue[_Item[T] | None] = queue.Queue(size)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, waiting, stop), name="read-shards", daemon=True)
    thread.start()
    try:
        while (entry := waiting.get()) is not None:
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
