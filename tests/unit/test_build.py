"""Build: what lands, what is quarantined, what is passed over, and what is searchable afterwards."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from index.errors import ConfigError, CorpusError, KnowledgeBaseError, QueryError
from index.ingest.build import QUARANTINE, BuildConfig, BuildReport, build
from index.ingest.readers import Sample, Shard
from index.knowledge_base import KnowledgeBase
from index.lock import writer_lock
from index.store import PairStore
from tests.fakes import HashEmbedder, caption_of, draw, encode, sample, write_img2dataset, write_tar


def build_at(kb: Path, *sources: Path, **config: object) -> BuildReport:
    return build(KnowledgeBase.create(kb, HashEmbedder()), [str(s) for s in sources], BuildConfig(**config))  # type: ignore[arg-type]


def contents(kb: Path) -> list[tuple[object, ...]]:
    """Everything in the table, in an order of its own: two builds of the same pairs have equal contents."""
    table = PairStore(kb).dataset.to_table().to_pylist()
    return sorted((tuple(map(str, row.values())) for row in table), key=str)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_img2dataset(tmp_path / "pets", shards=3, per_shard=5)
    return tmp_path / "pets"


def test_every_pair_lands_with_its_vector(corpus: Path, tmp_path: Path) -> None:
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_total, report.pairs_added, report.quarantined, report.shards_done) == (15, 15, 0, 3)
    store = PairStore(tmp_path / "kb")
    ids, vectors = store.ids_and_vectors()
    embedder = HashEmbedder()
    for row, vector in zip(store.get(ids), vectors, strict=True):
        image = draw(int(row.key))
        assert row.image.read() == encode(image)
        assert np.array_equal(vector, embedder.images([image])[0])
        assert (row.caption, row.width, row.height) == (caption_of(int(row.key)), 32, 32)
    assert report.snapshot == store.version


def test_building_unchanged_input_again_does_nothing(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    before = contents(tmp_path / "kb")
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_added, report.shards_done, report.shards_unchanged) == (0, 0, 3)
    assert report.pairs_total == report.pairs_in_sources == 15
    assert report.snapshot == PairStore(tmp_path / "kb").version
    assert build_at(tmp_path / "kb", corpus / "00001.tar").pairs_added == 0
    assert contents(tmp_path / "kb") == before


def test_a_shard_that_was_only_touched_is_read_once_more_and_not_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_at(tmp_path / "kb", corpus)
    ids, tags = PairStore(tmp_path / "kb").matching_ids(), KnowledgeBase.open(tmp_path / "kb", HashEmbedder()).snapshots
    (corpus / "00001.tar").touch()  # another time, the same content
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_added, report.shards_unchanged) == (0, 3)
    assert PairStore(tmp_path / "kb").matching_ids().tolist() == ids.tolist()
    read: list[str] = []
    monkeypatch.setattr("index.ingest.readers.Shard.digest", lambda shard: read.append(shard.name) or "")
    version = PairStore(tmp_path / "kb").version
    assert build_at(tmp_path / "kb", corpus).shards_unchanged == 3
    assert (read, PairStore(tmp_path / "kb").version) == ([], version)
    assert [each.tag for each in tags()] == ["build-1"]
    assert len(KnowledgeBase.open(tmp_path / "kb", HashEmbedder(), snapshot="build-1")) == 15


def test_a_changed_shard_is_made_again_and_no_other(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    write_tar(corpus / "00001.tar", sample(77, key="000000005") | sample(78, key="new"))
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_total, report.pairs_added, report.pairs_replaced, report.shards_done) == (12, 1, 1, 1)
    build_at(tmp_path / "fresh", corpus)
    assert contents(tmp_path / "kb") == contents(tmp_path / "fresh")


def test_a_new_shard_is_added(corpus: Path, tmp_path: Path) -> None:
    (corpus / "00002_stats.json").rename(tmp_path / "later")
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_total, report.shards_skipped) == (10, 1)
    (tmp_path / "later").rename(corpus / "00002_stats.json")
    report = build_at(tmp_path / "kb", corpus)
    assert (report.pairs_total, report.pairs_added, report.shards_skipped) == (15, 5, 0)


def test_bad_samples_are_quarantined_with_their_place(tmp_path: Path) -> None:
    members = [item for i in range(18) for item in sample(i).items()]
    members += [("broken.png", b"nonsense"), ("broken.txt", b"what is it"), *sample(3).items()]
    write_tar(tmp_path / "d" / "a.tar", members)
    report = build_at(tmp_path / "kb", tmp_path / "d")
    assert (report.pairs_total, report.quarantined) == (18, 2)
    lines = [json.loads(line) for line in (tmp_path / "kb" / QUARANTINE).read_text().splitlines()]
    assert {line["key"]: line["reason"].split(":")[0] for line in lines} == {
        "broken": "the image does not decode",
        "000000003": "duplicate key",
    }
    assert all(line["shard"] == "a.tar" and line["offset"] > 0 for line in lines)
    again = build_at(tmp_path / "kb", tmp_path / "d")
    assert (again.quarantined, PairStore(tmp_path / "kb").count_bad()) == (2, 2)


def test_a_vector_that_is_not_finite_is_quarantined(tmp_path: Path) -> None:
    class Sometimes(HashEmbedder):
        def embed(self, prepared):  # type: ignore[no-untyped-def]
            vectors = super().embed(prepared)
            vectors[0] = np.nan
            return vectors

    write_img2dataset(tmp_path / "d", shards=1, per_shard=20)
    kb = KnowledgeBase.create(tmp_path / "kb", Sometimes())
    assert build(kb, [str(tmp_path / "d")], BuildConfig()).quarantined == 1
    assert np.isfinite(kb.store.ids_and_vectors()[1]).all()


def test_too_many_bad_samples_fail_the_build(tmp_path: Path) -> None:
    members = [item for i in range(8) for item in sample(i).items()]
    write_tar(tmp_path / "d" / "a.tar", [*members, ("x.png", b"?"), ("x.txt", b"x"), ("y.txt", b"y")])
    with pytest.raises(CorpusError, match=r"2 of 10 samples are bad, a share of 0\.200"):
        build_at(tmp_path / "kb", tmp_path / "d")
    report = build_at(tmp_path / "kb", tmp_path / "d", max_bad_fraction=0.2)  # at most: exactly the share passes
    assert (report.pairs_total, report.quarantined) == (8, 2)


def test_a_wrong_source_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged after each shard once enough is read; what the ledger had of these sources counts too."""
    monkeypatch.setattr("index.ingest.build.JUDGED_FROM", 10)
    for number in range(8):
        rest = {f"bad{i}.{suffix}": b"?" for i in range(4) for suffix in ("png", "txt")}
        write_tar(tmp_path / "d" / f"{number}.tar", sample(number) | rest)
    with pytest.raises(CorpusError, match=r"^8 of the 10 samples so far are bad, a share of 0\.800 above.*no more are"):
        build_at(tmp_path / "kb", tmp_path / "d")
    store = PairStore(tmp_path / "kb")
    assert [record.shard for record in store.shards()] == ["0.tar", "1.tar"]
    assert len((tmp_path / "kb" / QUARANTINE).read_text().splitlines()) == 8
    report = build_at(tmp_path / "kb", tmp_path / "d", max_bad_fraction=0.8)
    assert (report.shards_done, report.shards_unchanged, report.pairs_total) == (6, 2, 8)


def test_bad_shards_beside_many_good_ones_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.build.JUDGED_FROM", 10)
    write_tar(tmp_path / "d" / "0.tar", [item for i in range(200) for item in sample(i).items()])
    build_at(tmp_path / "kb", tmp_path / "d")
    bad = {f"bad{i}.{suffix}": b"?" for i in range(12) for suffix in ("png", "txt")}
    write_tar(tmp_path / "d" / "1.tar", bad)
    assert build_at(tmp_path / "kb", tmp_path / "d").quarantined == 12
    write_tar(tmp_path / "d" / "1.tar", bad | sample(1))  # what is made again is not counted twice
    assert build_at(tmp_path / "kb", tmp_path / "d").quarantined == 12


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_source_that_has_been_mended_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_deleted: bool
) -> None:
    """What the ledger still has of its bad shards does not speak against the good ones read now."""
    bad = {f"bad{i}.{suffix}": b"?" for i in range(30) for suffix in ("png", "txt")}
    write_tar(tmp_path / "d" / "8.tar", sample(0) | bad)
    write_tar(tmp_path / "d" / "9.tar", sample(1))
    build_at(tmp_path / "kb", tmp_path / "d", max_bad_fraction=1.0)
    monkeypatch.setattr("index.ingest.build.JUDGED_FROM", 10)
    if is_deleted:
        (tmp_path / "d" / "8.tar").unlink()
    else:
        write_tar(tmp_path / "d" / "8.tar", sample(0))
    write_tar(tmp_path / "d" / "1.tar", [item for i in range(2, 22) for item in sample(i).items()])
    report = build_at(tmp_path / "kb", tmp_path / "d")
    assert (report.quarantined, report.pairs_in_sources) == (0, 21 if is_deleted else 22)


def test_a_shard_becomes_visible_while_the_reader_is_still_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of shards that waits long enough is committed, also when no further shard comes."""
    monkeypatch.setattr("index.ingest.build.GROUP_SECONDS", 0.05)
    monkeypatch.setattr("index.ingest.engines.IDLE_SECONDS", 0.01)
    has_landed = threading.Event()
    samples = Shard.samples

    def slowly(shard: Shard) -> Iterator[Sample]:
        if shard.name == "00001.tar":
            assert has_landed.wait(5), "the first shard waited for the second"
        return samples(shard)

    monkeypatch.setattr(Shard, "samples", slowly)
    write_img2dataset(tmp_path / "d", shards=2, per_shard=3)
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    build(kb, [str(tmp_path / "d")], BuildConfig(), on_shard=lambda record: has_landed.set())


def test_no_good_pair_fails_the_build_whatever_is_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "a.tar", [("x.png", b"?"), ("x.txt", b"x")])
    with pytest.raises(CorpusError, match="no sample of 1 could be used"):
        build_at(tmp_path / "kb", tmp_path / "d", max_bad_fraction=1.0)
    write_img2dataset(tmp_path / "e", shards=1, per_shard=1)
    (tmp_path / "e" / "00000_stats.json").rename(tmp_path / "e" / "00001_stats.json")
    with pytest.raises(CorpusError, match="none of the 1 shards is complete"):
        build_at(tmp_path / "kb", tmp_path / "e")


def test_two_sources_of_one_name(corpus: Path, tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "other" / "pets", shards=1, per_shard=2)
    with pytest.raises(CorpusError, match=r"'00000.tar' of dataset 'pets' is in .* --dataset"):
        build_at(tmp_path / "kb", corpus, tmp_path / "other" / "pets")
    build_at(tmp_path / "kb", corpus)
    with pytest.raises(CorpusError, match="--dataset"):
        build_at(tmp_path / "kb", tmp_path / "other" / "pets")
    report = build_at(tmp_path / "kb", tmp_path / "other" / "pets", dataset="more")
    assert report.pairs_total == 17
    assert build_at(tmp_path / "kb", corpus, corpus).pairs_added == 0  # the same one twice is no harm


def test_a_moved_source_gives_its_pairs_their_new_place(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    (tmp_path / "elsewhere").mkdir()
    corpus.rename(tmp_path / "elsewhere" / "pets")
    assert build_at(tmp_path / "kb", tmp_path / "elsewhere" / "pets").pairs_total == 15
    store = PairStore(tmp_path / "kb")
    assert all(row.image.read() for row in store.get(store.matching_ids()))


def test_an_id_that_belongs_to_another_pair_fails_the_build(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.records.pair_id", lambda dataset, shard, key: hash(key) % 3)
    with pytest.raises(CorpusError, match="belongs to another pair"):
        build_at(tmp_path / "kb", corpus)


def test_shards_longer_than_memory_allows_land_in_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.ingest.engines.STAGE_ROWS", 4)
    monkeypatch.setattr("index.ingest.decode.CHUNK_SAMPLES", 2)
    monkeypatch.setattr(HashEmbedder, "batch_rows", lambda self: 3)
    write_img2dataset(tmp_path / "d", shards=1, per_shard=20)
    before = KnowledgeBase.create(tmp_path / "kb", HashEmbedder()).store.version
    assert build_at(tmp_path / "kb", tmp_path / "d").pairs_total == 20
    store = PairStore(tmp_path / "kb")
    changes = [v["version"] for v in store.dataset.versions() if v["version"] > before]
    import lance

    counts = [lance.dataset(str(tmp_path / "kb" / "pairs.lance"), version=v).count_rows() for v in changes]
    assert set(counts) == {21}  # all at once: no version has a part of it


def test_the_embedder_decides_which_knowledge_base_it_may_fill(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    with pytest.raises(KnowledgeBaseError, match="cannot be compared"):
        KnowledgeBase.create(tmp_path / "kb", HashEmbedder(salt="other"))


def test_a_knowledge_base_does_not_lie_in_its_source(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside the source"):
        build_at(corpus / "kb", corpus)


@pytest.mark.parametrize("values", [{"max_bad_fraction": 1.5}, {"workers": 0}])
def test_impossible_settings(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        BuildConfig(**values)  # type: ignore[arg-type]


# The knowledge base


def test_what_is_added_is_found_and_what_is_removed_is_not(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    picture = draw(99)
    (new,) = kb.add(picture, "a zeppelin over the bay", metadata={"by": "me"})
    assert kb.add(picture, "a  zeppelin over the bay") == [new]
    for by in ("hybrid", "bm25", "tfidf"):
        assert kb.search("zeppelin", k=1, by=by)[0].id == new
    hit = kb.search(image=picture, k=1, by="clip")[0]
    assert (hit.id, hit.dataset) == (new, "added")
    assert hit.open_image().tobytes() == picture.tobytes()
    assert kb.store.count() == 16
    assert kb.remove([new]) == [new]
    assert list((tmp_path / "kb" / "added").iterdir()) == []
    assert all(h.id != new for h in kb.search(image=picture, k=100, by="clip"))
    victim = kb.search("red circle", k=1)[0].id
    kb.remove([victim])
    build_at(tmp_path / "kb", corpus)
    for name in ("00000.tar", "00001.tar", "00002.tar"):  # all shards are made again
        first = int(name[4]) * 5
        write_tar(corpus / name, {n: c for i in [*range(first, first + 5), first + 50] for n, c in sample(i).items()})
    assert build_at(tmp_path / "kb", corpus).pairs_total == 15 - 1 + 3
    assert all(h.id != victim for h in KnowledgeBase.open(tmp_path / "kb", HashEmbedder()).search("red circle", k=100))


def test_an_added_picture_is_measured_as_a_read_one_is(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    read = kb.show(int(kb.store.matching_ids()[0]))
    added = kb.show(kb.add(draw(int(read.key)), "the same picture")[0])
    measured = [(each.width, each.height, each.dhash, each.sha256) for each in (read, added)]
    assert measured[0] == measured[1]


def test_the_first_of_two_that_begin_at_once_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(directory: Path, *, wait: float) -> object:
        monkeypatch.undo()
        KnowledgeBase.create(directory, HashEmbedder(salt="other"))
        return writer_lock(directory, wait=wait)

    monkeypatch.setattr("index.knowledge_base.writer_lock", late)
    with pytest.raises(KnowledgeBaseError, match="cannot be compared"):
        KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    assert len(KnowledgeBase.open(tmp_path / "kb", HashEmbedder(salt="other"))) == 0


def test_another_process_sees_what_was_added(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    reader = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    assert len(reader.search("anything", k=100, by="clip")) == 15
    (new,) = KnowledgeBase.open(tmp_path / "kb", HashEmbedder()).add(draw(99), "a zeppelin")
    assert reader.search("zeppelin", k=1)[0].id == new
    KnowledgeBase.open(tmp_path / "kb", HashEmbedder()).remove([new])
    assert reader.search("zeppelin", k=1)[0].id != new


def test_one_picture_under_two_captions_outlives_one_of_them(tmp_path: Path) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    (first,) = kb.add(draw(1), "a dot")
    (second,) = kb.add(draw(1), "a spot")
    assert first != second
    kb.remove([first])
    assert kb.show(second).image.read() == encode(draw(1))


def test_more_hits_than_pairs(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    hits = kb.search("a red circle", k=1000)
    assert len(hits) == 15
    assert [h.rank for h in hits] == list(range(1, 16))


def test_an_empty_knowledge_base_says_so(tmp_path: Path) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    with pytest.raises(KnowledgeBaseError, match="empty"):
        kb.search("anything")
    assert kb.stats()["pairs"] == 0
    assert len(kb) == 0
    with pytest.raises(QueryError, match="there is no pair 7"):
        kb.show(7)


def test_what_is_not_a_knowledge_base(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeBaseError, match=r"has no kb\.json"):
        KnowledgeBase.open(tmp_path, HashEmbedder())
    (tmp_path / "kb.json").write_text("{")
    with pytest.raises(KnowledgeBaseError, match="cannot be read"):
        KnowledgeBase.open(tmp_path, HashEmbedder())
    (tmp_path / "kb.json").write_text('{"format": 99}')
    with pytest.raises(KnowledgeBaseError, match="format 99"):
        KnowledgeBase.open(tmp_path, HashEmbedder())


def test_what_cannot_be_added(tmp_path: Path) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    (tmp_path / "x.png").write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match=r"x\.png' cannot be added: the image does not decode"):
        kb.add(tmp_path / "x.png", "x")
    with pytest.raises(CorpusError, match="cannot read"):
        kb.add(tmp_path / "gone.png", "x")
    with pytest.raises(CorpusError, match="caption is empty"):
        kb.add(draw(1), "  ")
    assert len(kb) == 0


def test_a_searcher_is_replaced_whole_and_only_when_it_must_be(corpus: Path, tmp_path: Path) -> None:
    build_at(tmp_path / "kb", corpus)
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    first = kb.manifest.searcher
    kb.build_search()
    assert kb.manifest.searcher == first
    kb.add(draw(99), "a zeppelin")
    kb.build_search()
    assert kb.manifest.searcher != first
    assert KnowledgeBase.open(tmp_path / "kb", HashEmbedder()).search("zeppelin", k=1)[0].caption == "a zeppelin"
