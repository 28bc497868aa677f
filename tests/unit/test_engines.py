"""The local engine on shards made in memory: what is embedded, what is kept, what happens when a stage fails."""

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from index.embedder import DeferredEmbedder
from index.errors import ConfigError, CorpusError
from index.images import difference_hash, readable_image
from index.ingest.build import BuildConfig, build
from index.ingest.decode import CHUNK_BYTES, CHUNK_SAMPLES, KeepImages, chunks
from index.ingest.engines import StagedShard, run_local
from index.ingest.meter import Meter
from index.ingest.shards import Sample, Shard
from index.knowledge_base import KnowledgeBase
from index.records import BadSample, ImageLocation, StoredPair
from index.store import PairStore
from tests.fakes import PLACE, HashEmbedder, caption_of, draw, encode, pairs_of, shard_of, write_img2dataset


class Recorder(HashEmbedder):
    """Remembers how many images came in each batch; batches of 10."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        self.batches.append(len(prepared))
        return super().embed(prepared)

    def batch_rows(self) -> int:
        return 10


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    return PairStore.create(tmp_path, dim=32)


def stage(store: PairStore, shards: Iterable[Shard], **options: Any) -> Iterator[StagedShard]:
    options = {"embedder": HashEmbedder(), "workers": 2, "claim": lambda rows: None, **options}
    return run_local(
        ((shard, "stamp", "digest") for shard in shards), store=store, on_batch=lambda images: None, **options
    )


def commit(store: PairStore, staged: Iterable[StagedShard]) -> list[StoredPair]:
    with store.lock():
        for shard in staged:
            store.commit_shard(shard.record, shard.rows, is_new=True)
    return sorted(store.get(store.matching_ids(), vectors=True, thumbnails=True), key=lambda row: (row.shard, row.key))


def test_rows_hold_what_was_measured(store: PairStore) -> None:
    image = draw(3)
    (row, *others) = commit(store, stage(store, [shard_of("0.tar", pairs_of("0.tar", 4)[3:])]))
    assert not others
    assert (row.caption, row.image, row.width, row.height) == (caption_of(3), PLACE, 32, 32)
    assert row.sha256 == sha256(encode(image)).hexdigest()
    assert row.dhash == difference_hash(image)
    assert row.thumbnail is None
    assert row.vector is not None
    assert np.array_equal(row.vector, HashEmbedder().images([image])[0])


def test_batches_depend_on_the_shard_alone(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = BadSample(shard="0.tar", key="x", offset=0, reason="broken")
    for chunk in (1, 3, 16):
        monkeypatch.setattr("index.ingest.decode.CHUNK_SAMPLES", chunk)
        embedder, good = Recorder(), pairs_of("0.tar", 25)
        first = [*good[:7], bad, *good[7:]]
        shards = [shard_of("0.tar", first), shard_of("1.tar", []), shard_of("2.tar", pairs_of("2.tar", 10))]
        records = [staged.record for staged in stage(store, shards, embedder=embedder)]
        assert embedder.batches == [10, 10, 5, 10]
        assert [(r.shard, r.pairs, r.bad) for r in records] == [("0.tar", 25, 1), ("1.tar", 0, 0), ("2.tar", 10, 0)]


class Untouchable(HashEmbedder):
    """Pairs that bring their vectors need no network."""

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        raise AssertionError("an image was prepared")

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        raise AssertionError("an image was embedded")


def unit(seed: int, dim: int = 32) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def test_a_vector_that_comes_along_is_kept_as_it_is(store: PairStore) -> None:
    bare, shown = pairs_of("0.tar", 2)
    samples = [
        replace(bare, encoded=None, image=ImageLocation(uri=""), vector=unit(0)),
        replace(shown, vector=unit(1)),
    ]
    rows = commit(store, stage(store, [shard_of("0.tar", samples)], embedder=Untouchable()))
    assert [row.image.uri for row in rows] == ["", PLACE.uri]
    assert [(row.width, row.sha256 is None, row.dhash) for row in rows] == [(None, True, None), (32, False, None)]
    for row, seed in zip(rows, (0, 1), strict=True):
        assert row.vector is not None
        assert np.array_equal(row.vector, unit(seed))


def test_no_model_is_loaded_for_vectors_that_come_along(store: PairStore) -> None:
    def refuse(name: str) -> HashEmbedder:
        raise AssertionError(f"{name} was loaded")

    deferred = DeferredEmbedder(["m"], dim=32, fingerprint="f", load=refuse)
    samples = [replace(pair, encoded=None, vector=unit(i)) for i, pair in enumerate(pairs_of("0.tar", 5))]
    assert len(commit(store, stage(store, [shard_of("0.tar", samples)], embedder=deferred))) == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoded": None}, "neither an image nor a vector"),
        ({"encoded": None, "vector": unit(0, 16)}, "its vector has 16 numbers, the model's have 32"),
        ({"encoded": None, "vector": np.full(32, np.nan, np.float32)}, "its vector is not finite"),
        ({"encoded": b"no image", "vector": unit(0)}, "does not decode"),
        ({"encoded": b"no image"}, "does not decode"),
    ],
)
def test_what_cannot_be_used_is_a_bad_sample(store: PairStore, changes: dict[str, Any], reason: str) -> None:
    good, other = pairs_of("0.tar", 2)
    assert len(commit(store, stage(store, [shard_of("0.tar", [good, replace(other, **changes)])]))) == 1
    (sample,) = store.bad_samples()
    assert (sample.shard, sample.key, sample.offset) == ("0.tar", "00001", 512)
    assert reason in sample.reason


def test_chunks_are_bounded_in_samples_and_in_bytes() -> None:
    large = [replace(pair, encoded=bytes(CHUNK_BYTES // 3 + 1)) for pair in pairs_of("0.tar", 8)]
    assert [len(chunk) for chunk in chunks(large)] == [3, 3, 2]
    assert [len(chunk) for chunk in chunks(pairs_of("0.tar", 40))] == [16, 16, 8]
    assert list(chunks([])) == []


# Keeping images


def test_thumbnails_and_copies(store: PairStore) -> None:
    keep = KeepImages(copy=True, thumbnail=16)
    rows = commit(store, stage(store, [shard_of("0.tar", pairs_of("0.tar", 3))], keep=keep))
    for number, row in enumerate(rows):
        assert row.image.read() == encode(draw(number))
        assert row.thumbnail is not None
        assert row.thumbnail.startswith(b"\xff\xd8")
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        KeepImages(thumbnail=0)


def test_copies_make_a_knowledge_base_that_needs_no_source(tmp_path: Path) -> None:
    source = tmp_path / "data"
    count = write_img2dataset(source, shards=2, per_shard=5)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(kb, [str(source)], BuildConfig(keep=KeepImages(copy=True)))
    for path in source.iterdir():
        path.unlink()
    (tmp_path / "kb").rename(tmp_path / "moved")
    moved = KnowledgeBase.open(tmp_path / "moved", HashEmbedder())
    hits = moved.search("a red circle number 0", k=count)
    assert {hit.open_image().tobytes() for hit in hits} == {draw(number).tobytes() for number in range(count)}


def test_thumbnails_show_what_is_gone(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "data", shards=1, per_shard=2)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(kb, [str(tmp_path / "data")], BuildConfig(keep=KeepImages(thumbnail=8)))
    (tmp_path / "data" / "00000.tar").unlink()
    for row in kb.store.get(kb.store.matching_ids(), thumbnails=True):
        assert readable_image(row) == row.thumbnail


# When a stage fails or lags


def failing(samples: Sequence[Sample]) -> Iterator[Sample]:
    yield from samples
    raise OSError("the cable is out")


def test_whole_shards_are_handed_over_before_a_failure_is_raised(store: PairStore) -> None:
    shards = [shard_of("0.tar", pairs_of("0.tar", 3)), shard_of("1.tar", failing(pairs_of("1.tar", 3)))]
    seen = []
    with pytest.raises(OSError, match="cable"):
        seen.extend(shard.record.shard for shard in stage(store, shards))
    assert seen == ["0.tar"]


class Failing(HashEmbedder):
    """Its network gives out at the given calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self._calls, self._called = calls, 0

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        self._called += 1
        if self._called in self._calls:
            raise RuntimeError(f"call {self._called}")
        return super().embed(prepared)


@pytest.mark.parametrize("calls", [(3,), (3, 4)])
def test_shards_before_the_one_whose_network_fails_are_handed_over(store: PairStore, calls: tuple[int, ...]) -> None:
    staged = stage(store, [shard_of(f"{i}.tar", pairs_of(f"{i}.tar", 3)) for i in range(6)], embedder=Failing(*calls))
    handed: list[str] = []
    with pytest.raises(RuntimeError, match="call 3"):
        handed.extend(shard.record.shard for shard in staged)
    assert handed[:2] == ["0.tar", "1.tar"]
    assert "2.tar" not in handed


def test_the_network_has_work_while_rows_are_put_away(store: PairStore) -> None:
    """The network is not done with a shard before the rows of the one before are claimed."""
    claimed = [threading.Event() for _ in range(4)]

    class Waiting(Recorder):
        def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            vectors = super().embed(prepared)
            assert len(self.batches) == 1 or claimed[len(self.batches) - 2].wait(20)
            return vectors

    def claim(rows: Sequence[StoredPair]) -> None:
        claimed[int(rows[0].shard.removesuffix(".tar"))].set()

    shards = [shard_of(f"{i}.tar", pairs_of(f"{i}.tar", 3)) for i in range(4)]
    assert len(commit(store, stage(store, shards, embedder=Waiting(), claim=claim))) == 12


def test_a_long_build_finds_out_what_the_device_could_do(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(HashEmbedder):
        def most_images_per_second(self) -> float | None:
            return 1e6

    def build_share(embedder: HashEmbedder) -> float | None:
        meter = Meter()
        list(stage(store, [shard_of("0.tar", pairs_of("0.tar", 5))], embedder=embedder, meter=meter))
        progress = meter.progress
        assert meter.images == 5
        if progress.matrix_share is not None:
            assert progress.matrix_share == pytest.approx(5 / (1e6 * progress.seconds))
        return progress.matrix_share

    assert build_share(Known()) is None  # a short one
    monkeypatch.setattr("index.ingest.engines.MEASURE_AFTER", -1)
    assert build_share(HashEmbedder()) is None
    assert build_share(Known()) is not None


def test_a_claim_that_is_refused_stops_the_build(store: PairStore) -> None:
    def claim(rows: Sequence[StoredPair]) -> None:
        if rows[0].shard == "1.tar":
            raise CorpusError("taken")

    shards = [shard_of(f"{i}.tar", pairs_of(f"{i}.tar", 3)) for i in range(3)]
    seen = []
    with pytest.raises(CorpusError, match="taken"):
        seen.extend(shard.record.shard for shard in stage(store, shards, claim=claim))
    assert seen == ["0.tar"]


def test_a_full_disk_is_raised_where_it_is_heard(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> list[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "stage", full)
    with pytest.raises(OSError, match="No space left"):
        list(stage(store, [shard_of("0.tar", pairs_of("0.tar", 3))]))


def test_the_writer_does_not_hold_up_the_next_shard(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard's rows are written only once the second one has been embedded: that must not be a deadlock."""
    second_embedded = threading.Event()
    plain_stage = store.stage

    def patient(rows: Sequence[StoredPair], **options: Any) -> list[Any]:
        assert second_embedded.wait(20)
        return plain_stage(rows, **options)

    class Embedder(Recorder):
        def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            vectors = super().embed(prepared)
            if len(self.batches) == 2:
                second_embedded.set()
            return vectors

    monkeypatch.setattr(store, "stage", patient)
    shards = [shard_of(f"{i}.tar", pairs_of(f"{i}.tar", 4)) for i in range(2)]
    assert len(commit(store, stage(store, shards, embedder=Embedder()))) == 8


def test_what_is_read_ahead_is_bounded(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the network has not taken its first batch, the reader stops by itself."""
    monkeypatch.setattr("index.ingest.decode.CHUNK_SAMPLES", 1)
    pair, read = pairs_of("0.tar", 1)[0], 0
    may_embed = threading.Event()

    def endless() -> Iterator[Sample]:
        nonlocal read
        for number in range(5000):
            read += 1
            yield replace(pair, key=str(number))

    class Embedder(Recorder):
        def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            may_embed.wait(0.3)
            return super().embed(prepared)

    staged = stage(store, [shard_of("0.tar", endless())], embedder=Embedder(), claim=lambda rows: 1 / 0)
    monkeypatch.setattr("index.ingest.engines.STAGE_ROWS", 10)
    with pytest.raises(ZeroDivisionError):
        next(staged)
    assert read < 100  # a batch of 10, 36 in the queue, and those in the threads' hands


def test_closing_early_ends_the_threads(store: PairStore) -> None:
    shards = [shard_of(f"{i}.tar", pairs_of(f"{i}.tar", 20)) for i in range(8)]
    before = threading.active_count()
    staged = stage(store, shards)
    assert next(staged).record.shard == "0.tar"
    staged.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_meter_expects_the_shards_that_are_to_be_done(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "data", shards=3, per_shard=2)
    (tmp_path / "data" / "00001_stats.json").unlink()
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    for expected, pairs in ((2, 4), (0, 0)):
        meter = Meter()
        report = build(kb, [str(tmp_path / "data")], BuildConfig(), meter=meter)
        assert (meter.shards_found, meter.shards, meter.pairs) == (expected, expected, pairs)
        assert sum(report.stages.values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("count", [200, 2000])
def test_what_is_in_memory_does_not_grow_with_the_shard(
    store: PairStore, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Vectors stand for all that a pair holds; those that are alive are counted while a shard is read."""
    monkeypatch.setattr("index.ingest.engines.STAGE_ROWS", 32)
    monkeypatch.setattr("index.ingest.engines.AHEAD_CHUNKS", 2)
    monkeypatch.setattr("index.store.SMALL_ROWS", 16)  # blocks go to disk, as those of the real size do
    (pair,) = pairs_of("s", 1)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Vector(np.ndarray):
        __hash__ = object.__hash__

    def samples() -> Iterator[Any]:
        nonlocal most
        for number in range(count):
            vector = unit(number).view(Vector)
            alive.add(vector)
            most = max(most, len(alive))
            yield replace(pair, key=str(number), encoded=None, image=ImageLocation(uri=""), vector=vector)

    (staged,) = stage(store, [shard_of("s", samples())], workers=1)
    assert staged.record.pairs == count
    assert most <= 4 * CHUNK_SAMPLES + 8 * 32 + 32, most


class Announcing(HashEmbedder):
    """Says when it has embedded; waits for `turn` before."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.has_embedded = threading.Event(), threading.Event()
        self.patience = 0.0

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        self.turn.wait(self.patience)
        vectors = super().embed(prepared)
        self.has_embedded.set()
        return vectors


def one_with_images_and_many_with_vectors(many: int) -> Iterator[Shard]:
    yield shard_of("first.tar", pairs_of("first.tar", 3))
    for number in range(many):
        name = f"{number}.tar"
        yield shard_of(name, [replace(pair, encoded=None, vector=unit(number)) for pair in pairs_of(name, 1)])


def test_a_shard_is_staged_as_soon_as_the_network_is_done_with_it(
    store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when none that follows has anything for the network, and the reader never rests."""
    monkeypatch.setattr("index.ingest.engines.IDLE_SECONDS", 60.0)
    embedder, read = Announcing(), []

    def reader() -> Iterator[Shard]:
        for shard in one_with_images_and_many_with_vectors(200):
            if len(read) == 20:
                assert embedder.has_embedded.wait(5)
            read.append(shard.name)
            yield shard

    staged = stage(store, reader(), embedder=embedder)
    assert next(staged).record.shard == "first.tar"
    assert len(read) < 200
    assert len(list(staged)) == 200


def test_shards_without_images_do_not_pile_up_behind_one_that_has_the_network(store: PairStore) -> None:
    embedder, read = Announcing(), []
    embedder.patience = 0.5

    def reader() -> Iterator[Shard]:
        for shard in one_with_images_and_many_with_vectors(200):
            read.append(embedder.has_embedded.is_set())
            yield shard

    assert len(list(stage(store, reader(), embedder=embedder))) == 201
    assert 1 < read.count(False) < 100


def test_a_slow_reader_does_not_keep_back_what_is_done(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.engines.IDLE_SECONDS", 0.01)
    has_first, was_idle = threading.Event(), threading.Event()

    def reader() -> Iterator[Shard]:
        yield shard_of("0.tar", pairs_of("0.tar", 3))
        assert has_first.wait(5), "the first shard waited for the second"
        assert was_idle.wait(5)
        yield shard_of("1.tar", pairs_of("1.tar", 3))

    staged = stage(store, reader(), on_idle=was_idle.set)
    assert next(staged).record.shard == "0.tar"
    has_first.set()
    assert next(staged).record.shard == "1.tar"
