"""A knowledge base over its life: upgraded, built in groups, tagged, compacted, read while it is written."""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

import lance
import numpy as np
import pyarrow as pa
import pytest

from index.cli import make_app, run
from index.compaction import compact
from index.errors import KnowledgeBaseError, QueryError
from index.ingest.build import BuildConfig, BuildReport, build
from index.ingest.decode import KeepImages
from index.ingest.engines import StagedShard, run_local
from index.ingest.parts import Part
from index.knowledge_base import FORMAT, KnowledgeBase, Manifest
from index.records import ShardRecord, table_schema
from index.removals import Removed
from index.search.copies import Copies
from index.search.lexical import FTS_NAME
from index.search.retriever import Retriever
from index.snapshots import holding_removed
from index.store import PairStore, Rewrite
from index.verify import verify
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_img2dataset, write_tar

ROOT = Path(__file__).parents[2]
FORMAT_1_COLUMNS = [
    *("kind", "id", "dataset", "source", "shard", "shard_digest", "key", "caption", "image_uri", "image_offset"),
    *("image_size", "image_sha256", "width", "height", "metadata", "reason", "vector"),
]


def build_at(kb: Path, *sources: Path, **config: object) -> BuildReport:
    return build(KnowledgeBase.create(kb, HashEmbedder()), [str(s) for s in sources], BuildConfig(**config))  # type: ignore[arg-type]


def reopen(kb: Path) -> KnowledgeBase:
    return KnowledgeBase.open(kb, HashEmbedder())


def contents(kb: Path) -> list[tuple[str, ...]]:
    rows = PairStore(kb).dataset.to_table().to_pylist()
    return sorted(tuple(map(str, row.values())) for row in rows)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_img2dataset(tmp_path / "pets", shards=3, per_shard=5)
    return tmp_path / "pets"


# An older format


def make_format_1(kb: Path) -> None:
    """What the first radt wrote: the same rows without the columns of format 2, and a kb.json that says 1."""
    old = pa.schema([table_schema(32).field(name) for name in FORMAT_1_COLUMNS])
    rows = PairStore(kb).dataset.to_table(columns=FORMAT_1_COLUMNS)
    lance.write_dataset(rows.cast(old), str(kb / "pairs.lance"), schema=old, mode="overwrite")
    values = json.loads((kb / "kb.json").read_text())
    first = ("format", "model", "fingerprint", "dim", "created", "searcher")
    (kb / "kb.json").write_text(json.dumps({name: values[name] for name in first} | {"format": 1}))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {str(path): (info.st_size, info.st_mtime_ns) for path, info in found}


def test_an_older_format_is_read_as_it_is(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks writes nothing, also where he must not; several as one, earlier states, few rows and many."""
    build_at(tmp_path / "kb", corpus)
    expected = [hit.id for hit in reopen(tmp_path / "kb").search("a red circle", k=15)]
    make_format_1(tmp_path / "kb")
    before = files(tmp_path / "kb")
    for share in (0.001, 0.0):  # by scans, then by the map of rows
        monkeypatch.setattr("index.store.MAP_SHARE", share)
        kb = reopen(tmp_path / "kb")
        assert [hit.id for hit in kb.search("a red circle", k=15)] == expected
        (row,) = kb.store.get(expected[:1], vectors=True, thumbnails=True)
        assert (row.dhash, row.thumbnail) == (None, None)
        assert kb.show(expected[0]).caption == row.caption
        assert (kb.stats()["format"], len(kb)) == (1, 15)
        assert verify(kb).is_sound
        assert len(Copies(kb.store, kb.retriever.view, kb.embedder)._ids) == 15
    assert files(tmp_path / "kb") == before


def test_an_older_format_is_upgraded_in_place_when_it_is_written(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    before, hits = contents(tmp_path / "kb"), reopen(tmp_path / "kb").search("a red circle", k=15)
    make_format_1(tmp_path / "kb")
    kb = reopen(tmp_path / "kb")
    kb.remove([0])
    assert Manifest.read(tmp_path / "kb").format == kb.manifest.format == FORMAT
    assert kb.store.dataset.schema == table_schema(32)
    assert [hit.id for hit in kb.search("a red circle", k=15)] == [hit.id for hit in hits]
    columns = len(FORMAT_1_COLUMNS)
    assert [row[:columns] for row in contents(tmp_path / "kb")] == [row[:columns] for row in before]
    assert kb.store.get(kb.store.matching_ids()[:1])[0].dhash is None
    assert build_at(tmp_path / "kb", corpus).pairs_added == 0  # it is built on as if it had always been so
    (new,) = kb.add(draw(99), "a zeppelin")
    assert kb.search("zeppelin", k=1)[0].id == new


@pytest.mark.parametrize("step", ["index.store.PairStore.add_missing_columns", "index.knowledge_base.write_bytes"])
def test_an_upgrade_that_dies_is_done_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    build_at(tmp_path / "kb", corpus)
    make_format_1(tmp_path / "kb")

    def dies(*args: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(step, dies)
        with pytest.raises(RuntimeError, match="power cut"):
            reopen(tmp_path / "kb").remove([0])
    assert Manifest.read(tmp_path / "kb").format == 1
    build_at(tmp_path / "kb", corpus)
    assert Manifest.read(tmp_path / "kb").format == FORMAT


def test_an_upgrade_that_cannot_write_says_so(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_at(tmp_path / "kb", corpus)
    make_format_1(tmp_path / "kb")

    def refuses(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lance.LanceDataset.add_columns", refuses)
    with pytest.raises(KnowledgeBaseError, match=r"older format and has to be upgraded in place.*Permission denied"):
        reopen(tmp_path / "kb").add(draw(1), "a circle")
    assert len(reopen(tmp_path / "kb").search("red", k=99, by="clip")) == 15


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    values = json.loads((tmp_path / "kb" / "kb.json").read_text())
    (tmp_path / "kb" / "kb.json").write_text(json.dumps(values | {"format": FORMAT + 1, "novelty": True}))
    with pytest.raises(KnowledgeBaseError, match=rf"of format {FORMAT + 1} .* reads formats up to {FORMAT}"):
        reopen(tmp_path / "kb")


# Commits in groups


def test_tiny_shards_share_a_commit_and_a_fragment(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / "tree" / f"{number:02d}"
        folder.mkdir(parents=True)
        draw(number).save(folder / "x.png")
        (folder / "x.txt").write_text(caption_of(number))
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    heard: list[str] = []
    report = build(kb, [str(tmp_path / "tree")], BuildConfig(), on_shard=lambda record: heard.append(record.shard))
    assert (report.shards_done, report.pairs_total) == (30, 30)
    assert heard == [f"{number:02d}" for number in range(30)]
    assert len(kb.store.dataset.get_fragments()) == 1
    assert len(kb.store.shards()) == 30


@pytest.mark.parametrize("bound", ["GROUP_ROWS", "GROUP_BYTES", "GROUP_SECONDS"])
def test_any_bound_makes_a_group_due(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(f"index.ingest.build.{bound}", 0)
    build_at(tmp_path / "kb", corpus)
    assert len(PairStore(tmp_path / "kb").dataset.get_fragments()) == 3


def test_the_grouping_does_not_show_in_the_table(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_at(tmp_path / "together", corpus)
    monkeypatch.setattr("index.store.SMALL_ROWS", 0)  # every shard has its fragments
    monkeypatch.setattr("index.ingest.build.GROUP_ROWS", 7)
    build_at(tmp_path / "apart", corpus)
    assert contents(tmp_path / "together") == contents(tmp_path / "apart")
    write_tar(corpus / "00000.tar", sample(70))
    write_tar(corpus / "00002.tar", sample(71))
    for kb in (tmp_path / "together", tmp_path / "apart"):
        assert build_at(kb, corpus).pairs_total == 7
    assert contents(tmp_path / "together") == contents(tmp_path / "apart")


def test_whole_shards_land_when_a_later_one_fails(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> Generator[StagedShard, None, None]:
        staged = run_local(*args, **kwargs)  # type: ignore[arg-type]
        yield next(staged)
        yield next(staged)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("index.ingest.build.run_local", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_at(tmp_path / "kb", corpus)
    assert PairStore(tmp_path / "kb").count() == 10
    assert build_at(tmp_path / "kb", corpus).shards_done == 1


def test_nothing_is_read_on_when_a_shard_cannot_land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(HashEmbedder):
        def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
            time.sleep(0.05)
            return super().embed(prepared)

    def fail(record: ShardRecord) -> None:
        raise RuntimeError(record.shard)

    monkeypatch.setattr("index.ingest.build.GROUP_ROWS", 1)
    monkeypatch.setattr("index.ingest.engines.AHEAD_CHUNKS", 0)  # so that the reader is not done long before
    write_img2dataset(tmp_path / "pets", shards=20, per_shard=1)
    kb = KnowledgeBase.create(tmp_path / "kb", Slow())
    with pytest.raises(RuntimeError, match="00000") as held:
        build(kb, [str(tmp_path / "pets")], BuildConfig(workers=1), on_shard=fail)
    assert held.tb is not None  # a notebook keeps it, too
    assert "read-shards" not in {thread.name for thread in threading.enumerate()}


def test_pairs_of_shards_that_vanished_stay_until_they_are_pruned(corpus: Path, tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "birds", shards=1, per_shard=2)
    build_at(tmp_path / "kb", corpus, tmp_path / "birds")
    (corpus / "00001.tar").unlink()
    (corpus / "00002_stats.json").rename(tmp_path / "later")  # being downloaded again: not gone
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_total, report.shards_pruned) == (17, 0)
    report = build_at(tmp_path / "kb", corpus / "00000.tar", prune=True)  # one shard is no whole source
    assert (report.pairs_total, report.shards_pruned) == (17, 0)
    report = build_at(tmp_path / "kb", corpus, prune=True)
    assert (report.pairs_total, report.shards_pruned) == (12, 1)
    write_img2dataset(corpus, shards=3, per_shard=5)
    assert build_at(tmp_path / "kb", corpus).pairs_total == 17  # nothing was taken down: it may come back


def test_pruning_spares_the_shards_that_another_dataset_has_of_the_same_source(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus, dataset="first")
    (corpus / "00001.tar").unlink()
    report = build_at(tmp_path / "kb", corpus, dataset="second", prune=True)
    assert (report.pairs_total, report.shards_pruned) == (10 + 10, 1)
    assert reopen(tmp_path / "kb").store.datasets() == {"first": 10, "second": 10}


# Two writers, and readers meanwhile


def other_process(kb: Path, source: Path, *, dataset: str, wait: float = 0, holds: bool = False) -> "Popen[str]":
    """A build in a process of its own. It prints what it hears; one that `holds` the lock does so until it is told."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from index.cli import run
from index.ingest.build import BuildConfig, build
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder

def command(args):
    kb = KnowledgeBase.create({str(kb)!r}, HashEmbedder())
    config = BuildConfig(dataset={dataset!r}, wait={wait})
    def landed(record):
        print("landed", flush=True)
        if {holds}:
            sys.stdin.readline()
    build(kb, [{str(source)!r}], config, on_shard=landed, on_wait=lambda text: print(text, flush=True))

run(command, [])
"""
    return Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)


@pytest.mark.slow
def test_a_second_build_waits_when_it_is_told_to_and_says_so_otherwise(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "pets", shards=1, per_shard=3)
    kb = tmp_path / "kb"
    first = other_process(kb, tmp_path / "pets", dataset="a", holds=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "landed\n"
    patient = other_process(kb, tmp_path / "pets", dataset="b", wait=60)
    hasty = other_process(kb, tmp_path / "pets", dataset="c")
    out, err = hasty.communicate(timeout=60)
    assert (out, hasty.returncode) == ("", 1)
    assert err.startswith(f"error: {kb} is being written by process {first.pid};")
    assert patient.stdout is not None
    assert patient.stdout.readline() == f"{kb} is being written by process {first.pid}; waiting for it up to 60 s\n"
    first.communicate("go on\n", timeout=60)
    assert patient.communicate(timeout=60) == ("landed\n", "")
    assert (first.returncode, patient.returncode) == (0, 0)
    assert PairStore(kb).datasets() == {"a": 3, "b": 3}


def test_every_read_during_a_build_sees_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.build.GROUP_ROWS", 1)  # a commit for every shard
    write_img2dataset(tmp_path / "pets", shards=11, per_shard=8)
    build_at(tmp_path / "kb", tmp_path / "pets" / "00000.tar")

    class Slow(HashEmbedder):
        def embed(self, prepared):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return super().embed(prepared)

    def build_slowly() -> BuildReport:
        return build(KnowledgeBase.open(tmp_path / "kb", Slow()), [str(tmp_path / "pets")], BuildConfig())

    reader = reopen(tmp_path / "kb")
    seen: list[int] = []
    with ThreadPoolExecutor(1) as thread:
        building = thread.submit(build_slowly)
        while not building.done():
            hits = reader.search("a red circle", k=1000, by="clip")
            shards = Counter(row.shard for row in reader.store.get([hit.id for hit in hits]))
            assert set(shards.values()) == {8}, "a shard is there whole or not at all"
            seen.append(len(hits))
    assert building.result().pairs_total == 11 * 8
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "it read while the build committed"


# Snapshots


def test_every_build_that_changes_something_leaves_a_snapshot(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus / "00000.tar")
    build_at(tmp_path / "kb", corpus)
    build_at(tmp_path / "kb", corpus)
    kb = reopen(tmp_path / "kb")
    assert [(each.tag, each.pairs, each.in_searcher) for each in kb.snapshots()] == [
        ("build-1", 5, 5),
        ("build-2", 15, 15),
    ]
    kb.add(draw(99), "a zeppelin")
    build_at(tmp_path / "kb", corpus)  # what was added since is in this one
    assert [each.pairs for each in kb.snapshots()] == [5, 15, 16]
    assert [each["tag"] for each in kb.stats()["snapshots"]] == ["build-1", "build-2", "build-3"]


def test_a_snapshot_is_the_past_but_for_what_was_taken_down(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    then = {by: reopen(tmp_path / "kb").search("a red circle", k=50, by=by) for by in ("clip", "bm25", "hybrid")}
    write_tar(corpus / "00001.tar", sample(77, key="000000005") | sample(10, key="new"))
    build_at(tmp_path / "kb", corpus)
    now = reopen(tmp_path / "kb")
    past = KnowledgeBase.open(tmp_path / "kb", HashEmbedder(), snapshot="build-1")
    assert (len(past), len(now)) == (15, 12)
    for by, hits in then.items():
        found = past.search("a red circle", k=50, by=by)
        assert [(hit.id, hit.score, hit.caption) for hit in found] == [(h.id, h.score, h.caption) for h in hits], by
    victim = then["bm25"][0].id
    now.remove([victim])
    assert [hit.id for hit in past.search("a red circle", k=50, by="bm25")] == [h.id for h in then["bm25"][1:]]
    for by in ("bm25", "tfidf", "hybrid"):
        assert past.search("a red circle", k=1, by=by)[0].id != victim
    assert (len(past), past.store.get([victim])) == (14, [])
    with pytest.raises(KnowledgeBaseError, match="build-1 is the past"):
        past.remove([then["bm25"][1].id])
    with pytest.raises(KnowledgeBaseError, match="has no snapshot 'build-9'"):
        KnowledgeBase.open(tmp_path / "kb", HashEmbedder(), snapshot="build-9")


# Compaction


def in_files(folder: Path, marker: bytes) -> list[str]:
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and marker in path.read_bytes()
    ]


def answers(kb: KnowledgeBase) -> list[object]:
    asked = [kb.search("a red circle", k=50, by=by) for by in ("clip", "bm25", "tfidf", "hybrid")]
    return [[(hit.id, hit.score, hit.caption) for hit in hits] for hits in asked]


def many_fragments(kb: Path, corpus: Path) -> KnowledgeBase:
    """A knowledge base of several builds, additions and a removal, so that there is something to compact."""
    for shard in ("00000.tar", "00001.tar", "00002.tar"):
        build_at(kb, corpus / shard)
    base = reopen(kb)
    added = [base.add(draw(number), caption_of(number))[0] for number in (50, 51, 52)]
    base.remove(added[:1])
    base.build_search()  # BM25 counts its words anew when they are indexed; after that nothing may change
    return base


def test_compaction_changes_no_answer_and_is_done_once(corpus: Path, tmp_path: Path) -> None:
    kb = many_fragments(tmp_path / "kb", corpus)
    open_reader = reopen(tmp_path / "kb")
    before, rows = answers(kb), contents(tmp_path / "kb")
    assert answers(open_reader) == before
    report = compact(kb)
    assert report.pairs == 17
    assert (report.fragments_after, report.snapshots) == (1, ("build-1", "build-2", "build-3"))
    assert answers(kb) == answers(open_reader) == answers(reopen(tmp_path / "kb")) == before
    assert contents(tmp_path / "kb") == rows
    assert kb.unsearched() == 0
    version = kb.store.version
    again = compact(kb)
    assert (again.bytes_after, kb.store.version) == (report.bytes_after, version)
    assert kb.manifest.moved_files == ()
    (new,) = kb.add(draw(60), "a zeppelin")  # rows that come later are new ones
    assert kb.unsearched() == 1
    assert open_reader.search("zeppelin", k=1)[0].id == new
    assert build_at(tmp_path / "kb", corpus).pairs_added == 0


def test_compaction_lets_old_snapshots_go(corpus: Path, tmp_path: Path) -> None:
    for shard in ("00000.tar", "00001.tar", "00002.tar"):
        build_at(tmp_path / "kb", corpus / shard)
    kb = reopen(tmp_path / "kb")
    report = compact(kb, keep=1)
    assert (report.snapshots_dropped, report.snapshots) == (("build-1", "build-2"), ("build-3",))
    assert len(KnowledgeBase.open(tmp_path / "kb", HashEmbedder(), snapshot="build-3")) == 15
    assert build_at(tmp_path / "kb", corpus).pairs_added == 0
    assert [each.tag for each in kb.snapshots()] == ["build-3"]  # nothing new to remember
    report = compact(kb, keep=0)
    assert (report.snapshots_dropped, report.bytes_after < report.bytes_before) == (("build-3",), True)
    (corpus / "00001.tar").unlink()
    build_at(tmp_path / "kb", corpus, prune=True)
    assert [each.tag for each in kb.snapshots()] == ["build-4"]  # a name is used once


@pytest.mark.parametrize("searcher", ["exact", "lance"])
def test_what_is_taken_down_is_nowhere_after_compaction(tmp_path: Path, searcher: str) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    secret = draw(999)
    (gone,) = kb.add(secret, "qqsecretqq of somebody", metadata={"url": "https://qqurlqq"})
    (copied,) = kb.add(draw(998), "qqcopyqq", dataset="copies")
    (row,) = kb.store.get([copied], vectors=True)
    kb.store.add([replace(row, image_bytes=b"qqimageqq" * 50, thumbnail=b"qqthumbqq" * 50)])
    kept = [kb.add(draw(number), caption_of(number))[0] for number in range(8)]
    kb.build_search(searcher)  # type: ignore[arg-type]
    kb.tag_build()
    marks = [b"qqsecretqq", b"qqurlqq", b"qqcopyqq", b"qqimageqq", b"qqthumbqq", encode(secret)]
    for vector in (kb.show(gone).vector, kb.show(copied).vector):
        assert vector is not None
        marks.append(vector.tobytes())
    assert all(in_files(tmp_path / "kb", mark) for mark in marks), "the test can see them"
    kb.remove([gone, copied])
    report = compact(kb, searcher=searcher)  # type: ignore[arg-type]
    assert report.snapshots_dropped_for_removed == ("build-1",)
    assert [in_files(tmp_path / "kb", mark) for mark in marks] == [[]] * len(marks)
    assert sorted(kb.store.matching_ids().tolist()) == sorted(kept)
    assert reopen(tmp_path / "kb").stats()["removed"] == 2


@pytest.mark.parametrize("words_lag", [False, True])
def test_snapshots_made_after_a_removal_hold_it_in_their_files_too(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, words_lag: bool
) -> None:
    """As a deleted row among others; or, where the word index lags, as words (packed) of a file that is gone."""
    (alone,) = KnowledgeBase.create(tmp_path / "kb", HashEmbedder()).add(draw(998), "qqaloneqq")
    build_at(tmp_path / "kb", corpus / "00000.tar", keep=KeepImages(copy=True))
    kb = reopen(tmp_path / "kb")
    ids = {row.key: row.id for row in kb.store.get(kb.store.matching_ids())}
    marks = [encode(draw(2)), b"qqaloneqq"]
    assert all(in_files(tmp_path / "kb", mark) for mark in marks), "the test can see them"
    kb.store.index_ids(min_rows=1)  # which know no deleted rows
    kb.remove([alone] if words_lag else [ids["000000002"], alone])
    if words_lag:
        monkeypatch.setattr("index.knowledge_base._spare", lambda *_, **__: 1000)
        marks = [b"qqaloneqq"]
    for shard in ("00001.tar", "00002.tar"):
        build_at(tmp_path / "kb", corpus / shard)
    monkeypatch.undo()
    report = compact(reopen(tmp_path / "kb"))
    assert [in_files(tmp_path / "kb", mark) for mark in marks] == [[]] * len(marks)
    assert report.snapshots_dropped_for_removed == ("build-1", "build-2")
    assert report.snapshots == ("build-3",), "which is the present now"
    assert holding_removed(PairStore(tmp_path / "kb")) == []


def test_one_deleted_row_of_a_large_file_is_purged(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_at(tmp_path / "kb", corpus)
    monkeypatch.setattr("index.store.FRAGMENT_ROWS", 2)  # every file is a large one
    kb = reopen(tmp_path / "kb")
    (row,) = kb.store.get(kb.store.matching_ids("key = '000000007'"), vectors=True)
    assert row.vector is not None
    kb.remove([row.id])
    assert in_files(tmp_path / "kb", row.vector.tobytes())
    compact(kb)
    assert in_files(tmp_path / "kb", row.vector.tobytes()) == []
    assert len(kb) == 14


@pytest.mark.parametrize(
    "step",
    [
        "index.store.PairStore.index_ids",
        "index.store.PairStore.rewrite_fragments",
        "index.store.PairStore.commit_rewrite",
        "lance.optimize.Compaction.commit",
        "index.compaction.holding_removed",
        "index.store.PairStore.forget_versions",
        "index.compaction._sweep",
    ],
)
def test_a_compaction_that_dies_is_done_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    kb = many_fragments(tmp_path / "kb", corpus)
    before = answers(kb)

    def dies(*args: object, **kwargs: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(step, dies)
        with pytest.raises(RuntimeError, match="power cut"):
            compact(kb)
    assert answers(reopen(tmp_path / "kb")) == before
    (new,) = reopen(tmp_path / "kb").add(draw(60), "a zeppelin")
    assert reopen(tmp_path / "kb").search("zeppelin", k=1)[0].id == new
    reopen(tmp_path / "kb").remove([new])
    assert answers(reopen(tmp_path / "kb")) == before
    assert compact(reopen(tmp_path / "kb")).fragments_after == 1
    assert answers(reopen(tmp_path / "kb")) == before


def test_a_compaction_may_die_right_after_its_commit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb = many_fragments(tmp_path / "kb", corpus)
    before, commit = answers(kb), PairStore.commit_rewrite

    def dies(store: PairStore, rewrite: Rewrite) -> None:
        commit(store, rewrite)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(PairStore, "commit_rewrite", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            compact(kb)
    after = reopen(tmp_path / "kb")
    assert answers(after) == before
    assert (after.unsearched(), after.manifest.moved_files != ()) == (0, True)
    after.add(draw(60), "a zeppelin")
    assert after.unsearched() == 1


def test_what_killed_builds_left_is_swept(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    kb = reopen(tmp_path / "kb")
    rows = kb.store.get(kb.store.matching_ids(), vectors=True)
    other = PairStore(tmp_path / "kb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("index.store.SMALL_ROWS", 0)
        other.stage([replace(row, caption="qqleftoverqq") for row in rows])  # on disk, never committed
    (tmp_path / "kb" / ".kb.json.new-12345678").write_text("half")
    (tmp_path / "kb" / "searchers" / ".1-exact.new-12345678").mkdir()
    assert in_files(tmp_path / "kb", b"qqleftoverqq")
    compact(kb)
    assert in_files(tmp_path / "kb", b"qqleftoverqq") == []
    assert not list((tmp_path / "kb").rglob(".*"))


# What stats say


def test_stats_say_what_is_there_and_what_is_not(corpus: Path, tmp_path: Path) -> None:
    members = [item for number in range(20, 38) for item in sample(number).items()]
    write_tar(tmp_path / "birds" / "a.tar", [*members, ("x.png", b"nonsense"), ("x.txt", b"what"), ("y.txt", b"alone")])
    build_at(tmp_path / "kb", corpus, tmp_path / "birds", max_bad_fraction=0.5)
    kb = reopen(tmp_path / "kb")
    kb.add(draw(99), "a zeppelin")
    kb.remove(where="dataset = 'pets' AND key < '000000003'")
    stats = json.loads(json.dumps(kb.stats()))
    assert stats["datasets"] == {"added": 1, "birds": 18, "pets": 12}
    assert (stats["pairs"], stats["shards"], stats["removed"], stats["quarantined"]) == (31, 4, 3, 2)
    assert sum(stats["layouts"].values()) == 4
    assert sum(stats["quarantined_by_reason"].values()) == 2
    assert stats["quarantined_by_reason"]["the image does not decode"] == 1
    assert (stats["not_in_searcher"], stats["not_in_word_index"]) == (1, 1)
    assert stats["bytes"] == sum(path.stat().st_size for path in (tmp_path / "kb").rglob("*") if path.is_file())
    assert {"rows", "word and id indices", "history", "searchers", "added", "other"} == stats["bytes_by_part"].keys()
    kb.build_search()
    assert (kb.stats()["not_in_searcher"], kb.stats()["not_in_word_index"]) == (0, 0)


def test_the_quarantine_can_be_asked(tmp_path: Path) -> None:
    members = [item for number in range(18) for item in sample(number).items()]
    write_tar(tmp_path / "d" / "a.tar", [*members, ("x.png", b"nonsense"), ("x.txt", b"what"), ("y.png", b"alone")])
    build_at(tmp_path / "kb", tmp_path / "d")
    kb = reopen(tmp_path / "kb")
    assert len(kb.quarantine()) == 2
    assert len(kb.quarantine(limit=1)) == 1
    (found,) = kb.quarantine("reason LIKE '%decode%' AND image_offset > 0")
    assert (found.shard, found.key) == ("a.tar", "x")
    with pytest.raises(QueryError, match="cannot filter by 'colour = 3'"):
        kb.quarantine("colour = 3")


def test_one_image_can_be_taken_down_under_all_its_captions(tmp_path: Path) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    first, second = (kb.add(draw(1), caption)[0] for caption in ("a dot", "a spot"))
    other, last = (kb.add(draw(number), "a dot")[0] for number in (2, 3))
    reader = reopen(tmp_path / "kb")
    assert len(reader.search("dot", k=9, by="bm25")) == 3
    assert sorted(kb.remove([first], same_image=True)) == sorted([first, second])
    assert {hit.id for hit in reader.search("dot", k=9, by="bm25")} == {other, last}  # an open reader obeys at once
    (sha,) = (row.sha256 for row in kb.store.get([other]))
    assert kb.remove(where=f"image_sha256 = '{sha}'") == [other]
    assert kb.remove([12345], same_image=True) == []


def test_what_is_forbidden_is_not_served(tmp_path: Path) -> None:
    """The same bytes at other addresses go, and other bytes at any of these addresses; what shares only those stays."""
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    images = {"asked": 1, "same bytes": 1, "same address": 2, "address of the same bytes": 3, "no address": 4, "far": 2}
    urls = {"asked": "u", "same bytes": "v", "same address": "u", "address of the same bytes": "v", "far": "w"}
    ids = {
        name: kb.add(draw(number), name, metadata={"url": urls[name]} if name in urls else {"link": "u"})[0]
        for name, number in images.items()
    }
    (row,) = kb.store.get([ids["no address"]], vectors=True)
    undigested = replace(row, id=7, key="undigested", sha256=None, metadata={"url": "v"})
    kb.store.add([undigested])
    (digest,) = (row.sha256 for row in kb.store.get([ids["asked"]]))
    gone = kb.remove([ids["asked"]], same_image=True)
    assert len(gone) == len(set(gone))
    assert set(kb.store.captions()[1]) == {"no address", "far"}
    assert sorted(gone) == sorted({*ids.values(), 7} - {ids["no address"], ids["far"]})
    forbidden = Removed.read(kb.store.dataset)
    assert not any(forbidden.forbids(row) for row in kb.store.get(kb.store.matching_ids()))
    assert (forbidden.digests, forbidden.urls) == ({digest}, {"u", "v"})
    assert kb.remove([ids["far"]]) == [ids["far"]]
    assert Removed.read(kb.store.dataset).urls == {"u", "v"}, "a removal by id alone forbids nothing"


@pytest.mark.parametrize("parts", [False, True])
def test_an_image_that_was_taken_down_comes_back_under_no_name(tmp_path: Path, *, parts: bool) -> None:
    """Neither its bytes nor its address; one taken down by itself comes back under another name, as it may."""
    write_tar(tmp_path / "a" / "0.tar", sample(1) | sample(2) | sample(3))
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(kb, [str(tmp_path / "a")], BuildConfig())
    ids = {int(row.key): row.id for row in kb.store.get(kb.store.matching_ids())}
    kb.remove([ids[1]], same_image=True)
    kb.remove([ids[2]])
    again = {**sample(1, key="x1"), **sample(2, key="x2"), **sample(4)}
    again["000000004.json"] = again["000000004.json"].replace(b"/4.png", b"/1.png")  # other bytes from the same place
    write_tar(tmp_path / "b" / "0.tar", again | sample(5))
    config = BuildConfig(part=Part.parse("1/1") if parts else None)
    report = build(KnowledgeBase.open(tmp_path / "kb", HashEmbedder()), [str(tmp_path / "b")], config)
    assert (report.pairs_added, report.pairs_forbidden, report.pairs_in_sources) == (2, 2, 4)
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    assert set(kb.store.captions()[1]) == {caption_of(i) for i in (2, 3, 5)}
    assert kb.store.count_removed() == 4
    assert verify(kb).is_sound  # the ledger counts what was turned away as taken down
    write_tar(tmp_path / "b" / "0.tar", again)
    report = build(kb, [str(tmp_path / "b")], BuildConfig(max_bad_fraction=0.5))
    assert (report.pairs_total, report.pairs_forbidden, kb.store.count_removed()) == (2, 0, 4)  # told once


def test_readers_read_on_while_it_is_compacted(corpus: Path, tmp_path: Path) -> None:
    kb = many_fragments(tmp_path / "kb", corpus)
    reader, before = reopen(tmp_path / "kb"), answers(kb)
    with ThreadPoolExecutor(1) as thread:
        compacting = thread.submit(compact, reopen(tmp_path / "kb"))
        while not compacting.done():
            assert answers(reader) == before
    compacting.result()
    assert answers(reader) == before


def test_a_query_whose_files_a_compaction_deleted_is_asked_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb = many_fragments(tmp_path / "kb", corpus)
    reader, before = reopen(tmp_path / "kb"), answers(kb)
    search, failed = Retriever.search, []

    def too_late(retriever: Retriever, *args: object, **kwargs: object) -> object:
        if not failed:
            failed.append(compact(kb))
            raise pa.ArrowInvalid("External error: LanceError(IO): Not found: data/1.lance")
        return search(retriever, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Retriever, "search", too_late)
    assert answers(reader) == before
    assert failed
    monkeypatch.setattr(Retriever, "search", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("a broken disk")))
    with pytest.raises(OSError, match="a broken disk"):  # nothing has changed: it is no one's compaction
        reader.search("a red circle")


# From the command line


@pytest.fixture
def radt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; its exit code and what it prints."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run(make_app(None), [str(word) for word in words])
        code = exit_.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


def test_the_commands_of_the_life_cycle(
    corpus: Path, tmp_path: Path, radt: Callable[..., tuple[int, str, str]]
) -> None:
    write_tar(tmp_path / "birds" / "a.tar", [*sample(20).items(), ("x.png", b"nonsense"), ("x.txt", b"what")])
    build_at(tmp_path / "kb", corpus, tmp_path / "birds")
    stats = json.loads(radt("stats", "--kb", tmp_path / "kb", "--json")[1])
    assert [each["tag"] for each in stats["snapshots"]] == ["build-1"]
    code, out, err = radt("stats", "--kb", tmp_path / "kb")
    assert (code, err) == (0, "")
    assert all(word in out for word in ("build-1", "not_in_searcher", "word and id indices", "the image does not"))
    asked = ("stats", "--quarantine", "--kb", tmp_path / "kb")
    code, out, err = radt(*asked)
    assert (code, err) == (0, "")
    assert "a.tar" in out
    document = json.loads(radt(*asked, "--json")[1])
    assert (document["quarantined"], document["by_reason"]) == (1, {"the image does not decode": 1})
    assert [(each["shard"], each["key"]) for each in document["samples"]] == [("a.tar", "x")]
    assert json.loads(radt(*asked, "--where", "shard = 'b.tar'", "--json")[1])["samples"] == []
    assert radt("stats", "--kb", tmp_path / "kb", "--where", "id = 1")[0] == 2
    sha = PairStore(tmp_path / "kb").get(PairStore(tmp_path / "kb").matching_ids()[:1])[0].sha256
    code, out, err = radt("remove", "--where", f"image_sha256 = '{sha}'", "--kb", tmp_path / "kb")
    assert (code, out) == (0, "removed 1\n")
    assert f"radt index compact --kb {tmp_path / 'kb'}" in err
    code, out, err = radt("remove", "--where", "metadata LIKE '%example.org/7.png%'", "--kb", tmp_path / "kb")
    assert (code, out) == (0, "removed 1\n")
    code, out, err = radt("compact", "--kb", tmp_path / "kb", "--keep", 3)
    assert (code, err) == (0, "")
    assert "build-1" in out
    document = json.loads(radt("compact", "--kb", tmp_path / "kb", "--json")[1])
    assert (document["pairs"], document["snapshots"], document["fragments_after"]) == (14, [], 1)
    with PairStore(tmp_path / "kb").lock():
        code, out, err = radt("compact", "--kb", tmp_path / "kb", "--wait", 0.1)
    assert (code, out) == (1, "")
    assert "waiting for it up to 0 s" in err
    assert "run the command again when it has ended" in err


def test_a_query_of_a_snapshot(corpus: Path, tmp_path: Path, radt: Callable[..., tuple[int, str, str]]) -> None:
    build_at(tmp_path / "kb", corpus / "00000.tar")
    build_at(tmp_path / "kb", corpus)
    asked = ("query", "circle", "--by", "bm25", "-k", 50, "--kb", tmp_path / "kb", "--json")
    counts = [len(json.loads(radt(*asked, *more)[1])["hits"]) for more in ([], ["--snapshot", "build-1"])]
    assert counts == [10, 5]
    code, out, err = radt(*asked, "--snapshot", "build-7")
    assert (code, out) == (1, "")
    assert "has no snapshot 'build-7'" in err


def test_a_small_tail_waits_outside_searcher_and_word_index(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_at(tmp_path / "kb", corpus, searcher="lance")
    write_img2dataset(tmp_path / "birds", shards=1, per_shard=3)
    monkeypatch.setattr("index.knowledge_base.LAGGING_SHARE", 0.5)
    build_at(tmp_path / "kb", tmp_path / "birds", searcher="lance")
    kb = reopen(tmp_path / "kb")
    assert (kb.unsearched(), kb.store.count_unindexed(FTS_NAME)) == (3, 3)
    assert [(each.pairs, each.in_searcher) for each in kb.snapshots()] == [(15, 15), (18, 15)]
    for by in ("clip", "bm25"):
        assert "birds" in {hit.dataset for hit in kb.search("a red circle number 0", k=50, by=by)}
    compact(kb)
    assert (kb.unsearched(), kb.store.count_unindexed(FTS_NAME)) == (0, 0)
    assert kb.stats()["searcher"] == "lance"  # what was asked for once


def test_compaction_keeps_the_searcher_that_another_process_has_built_meanwhile(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    early = reopen(tmp_path / "kb")
    assert early.searcher_choice() == "auto"
    build_at(tmp_path / "kb", corpus, searcher="lance")
    assert compact(early).searcher == "lance"
