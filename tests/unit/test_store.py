"""PairStore: one commit per shard, replacement, removal for good, one writer."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.errors import KnowledgeBaseError, QueryError
from index.records import BadSample, ImageLocation, ShardRecord, StoredPair, pair_id
from index.store import PairStore, Staged

DIM = 8


def stored(key: str, *, dataset: str = "pets", shard: str = "0.tar", caption: str = "a cat") -> StoredPair:
    vector = np.random.default_rng(pair_id(dataset, shard, key)).normal(size=DIM).astype(np.float32)
    return StoredPair(
        id=pair_id(dataset, shard, key),
        dataset=dataset,
        source="/data",
        shard=shard,
        digest="d0",
        key=key,
        caption=caption,
        image=ImageLocation(uri="/data/0.tar", offset=512, size=10),
        sha256="ab" * 32,
        width=4,
        height=3,
        metadata={"who": key},
        vector=vector / np.linalg.norm(vector),
    )


def record(*, shard: str = "0.tar", digest: str = "d0", pairs: int = 0, bad: int = 0) -> ShardRecord:
    return ShardRecord(
        dataset="pets", source="/data", shard=shard, digest=digest, stamp="s", pairs=pairs, bad=bad, bytes=1
    )


def commit(store: PairStore, entry: ShardRecord, pairs: list[StoredPair]) -> None:
    store.commit_shard(entry, store.stage(pairs, record=entry))


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    return PairStore.create(tmp_path, dim=DIM)


def test_a_shard_is_invisible_until_its_one_commit(store: PairStore) -> None:
    pairs = [stored("a"), stored("b")]
    bad = [BadSample(shard="0.tar", key="c", offset=7, reason="no caption")]
    staged = store.stage(pairs, record=record(pairs=2, bad=1), bad=bad)
    assert PairStore(store.directory).count() == 0
    before = store.version
    store.commit_shard(record(pairs=2, bad=1), staged)
    assert store.version == before + 1
    again = PairStore(store.directory)
    assert again.count() == 2
    assert again.shards() == [record(pairs=2, bad=1)]
    assert again.bad_samples() == bad
    ids, vectors = again.ids_and_vectors()
    assert ids.tolist() == [p.id for p in pairs]
    assert np.array_equal(vectors, np.stack([p.vector for p in pairs if p.vector is not None]))


def test_a_remade_shard_replaces_its_rows_and_no_others(store: PairStore) -> None:
    commit(store, record(pairs=2), [stored("a"), stored("b")])
    commit(store, record(shard="1.tar", pairs=1), [stored("z", shard="1.tar")])
    commit(store, record(digest="d1", pairs=1), [stored("b", caption="a dog")])
    assert sorted(store.captions()[1]) == ["a cat", "a dog"]
    assert sorted((s.shard, s.digest) for s in store.shards()) == [("0.tar", "d1"), ("1.tar", "d0")]


def test_an_empty_shard_is_remembered(store: PairStore) -> None:
    commit(store, record(), [])
    assert store.shards() == [record()]
    assert store.count() == 0


def test_get_keeps_the_order_asked_for_and_skips_what_is_not_there(store: PairStore) -> None:
    a, b = stored("a"), stored("b")
    store.add([a, b])
    rows = store.get([b.id, 12345, a.id], vectors=True)
    assert [row.id for row in rows] == [b.id, a.id]
    assert rows[0].metadata == {"who": "b"}
    assert np.array_equal(rows[0].vector, b.vector)
    assert store.get([]) == []


def test_removed_pairs_do_not_come_back_with_a_remade_shard(store: PairStore) -> None:
    a, b = stored("a"), stored("b")
    commit(store, record(pairs=2), [a, b])
    assert store.remove([a.id, 999]) == [a.id]
    assert store.matching_ids().tolist() == [b.id]
    commit(store, record(digest="d1", pairs=2), [a, b])
    assert store.matching_ids().tolist() == [b.id]
    store.add([a])  # asked for by name: welcome again
    assert sorted(store.matching_ids().tolist()) == sorted([a.id, b.id])


@pytest.mark.parametrize("small_rows", [0, 4096])
def test_what_is_staged_says_how_many_pairs_will_be_there(
    store: PairStore, monkeypatch: pytest.MonkeyPatch, small_rows: int
) -> None:
    """On disk as in memory; without what was taken down, by id or by image, and in blocks as in one."""
    monkeypatch.setattr("index.store.SMALL_ROWS", small_rows)
    store.add([stored("taken down"), replace(stored("image"), sha256="cd" * 32)])
    store.remove([stored("taken down").id])
    store.remove([stored("image").id], same_image=True)
    pairs = [stored("a"), stored("b"), stored("taken down"), replace(stored("c"), sha256="cd" * 32)]
    bad = [BadSample(shard="0.tar", key="c", offset=7, reason="no caption")]
    entry = record(pairs=4, bad=1)
    blocks = Staged.together([store.stage(pairs[:1]), store.stage([]), store.stage(pairs[1:], record=entry, bad=bad)])
    whole = store.stage(pairs, record=entry, bad=bad)
    assert (blocks.pairs, blocks.forbidden) == (whole.pairs, whole.forbidden) == (2, 1)
    assert bool(whole.tables) == bool(whole.bytes_in_memory) == bool(small_rows) != bool(whole.fragments)
    store.commit_shard(entry, blocks)
    assert sorted(pair.key for pair in store.get(store.matching_ids())) == ["a", "b"]
    assert (store.count_bad(), store.count_removed()) == (1, 3)


def test_a_removal_reads_digests_and_addresses_only_for_the_same_image(
    store: PairStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lance

    store.add([stored("a"), stored("b")])
    asked: list[str] = []
    to_table = lance.LanceDataset.to_table

    def told(dataset: Any, columns: Any = None, **options: Any) -> Any:
        asked.extend(columns)
        return to_table(dataset, columns=columns, **options)

    monkeypatch.setattr(lance.LanceDataset, "to_table", told)
    assert store.remove([stored("a").id]) == [stored("a").id]
    assert asked == ["id", "dataset", "shard"]
    assert store.remove([stored("b").id], same_image=True) == [stored("b").id]
    assert {"image_sha256", "metadata"} < set(asked)


def test_filters(store: PairStore) -> None:
    store.add([stored("a"), stored("b", dataset="birds", caption="it's a wren")])
    assert store.count("dataset = 'birds'") == 1
    assert store.datasets() == {"birds": 1, "pets": 1}
    assert store.captions("caption LIKE '%wren%'")[1] == ["it's a wren"]
    with pytest.raises(QueryError, match="colour"):
        store.count("colour = 3")
    with pytest.raises(QueryError, match="cannot filter by"):
        store.matching_ids("dataset = = 'x'")
    assert store.remove(where="dataset = 'birds'") == [pair_id("birds", "0.tar", "b")]
    assert store.count() == 1


def test_rows_after_are_those_written_since(store: PairStore) -> None:
    store.add([stored("a")])
    mark = store.high_water
    assert store.rows_after(mark)[0].tolist() == []
    store.add([stored("b")])
    store.remove([stored("a").id])
    assert store.rows_after(mark)[0].tolist() == [stored("b").id]


def test_a_second_writer_is_told_who_writes(store: PairStore) -> None:
    other = PairStore(store.directory)
    with store.lock():
        store.add([stored("a")])  # the holder may write
        with pytest.raises(KnowledgeBaseError, match="being written by process"):
            other.add([stored("b")])
    other.add([stored("b")])
    assert other.count() == 2
    assert store.count() == 1
    assert store.refresh()
    assert store.count() == 2
    assert not store.refresh()


def test_lancedb_reads_the_same_table(store: PairStore) -> None:
    store.add([stored("a")])
    assert store.table.count_rows("kind = 'pair'") == 1
    store.add([stored("b")])
    assert store.table.count_rows("kind = 'pair'") == 2


def test_an_image_inside_the_folder_moves_with_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    store = PairStore.create(tmp_path / "a", dim=DIM)
    pair = stored("a")
    inside = StoredPair(
        **{f: getattr(pair, f) for f in StoredPair.__slots__} | {"image": ImageLocation(uri="added/x.png")}
    )
    store.add([inside])
    (tmp_path / "a").rename(tmp_path / "b")
    assert PairStore(tmp_path / "b").get([pair.id])[0].image.uri == str(tmp_path / "b" / "added/x.png")


def test_threads_take_turns(store: PairStore) -> None:
    def add(number: int) -> None:
        store.add([stored(str(number))])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(12)))
    assert store.count() == 12


def test_creating_twice_keeps_what_is_there(store: PairStore) -> None:
    store.add([stored("a")])
    assert PairStore.create(store.directory, dim=DIM).count() == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeBaseError, match="cannot write to"):
        PairStore.create(tmp_path / "gone", dim=DIM)


def test_indices_change_no_answer(store: PairStore) -> None:
    a, b, c, d = (stored(key) for key in "abcd")
    commit(store, record(pairs=3), [a, b, c])
    store.index_ids(min_rows=1)
    version = store.version
    store.index_ids(min_rows=1)
    assert store.version == version
    for is_fresh in (True, False):
        assert [row.id for row in store.get([c.id, a.id])] == [c.id, a.id], is_fresh
        assert store.count() == 3
        store.remove([b.id])
        assert store.get([b.id]) == []
        store.add([d, b])
        assert sorted(store.matching_ids().tolist()) == sorted(p.id for p in (a, b, c, d))
        commit(store, record(digest="d1", pairs=3), [a, b, c])
        store.remove([d.id])
        assert [row.digest for row in store.get([a.id])] == ["d0"]
        store.index_ids(min_rows=1)


def test_a_missing_file_is_not_taken_for_a_mistake_in_the_filter(store: PairStore) -> None:
    store.add([stored("a")])
    for path in (store.directory / "pairs.lance" / "data").iterdir():
        path.unlink()
    with pytest.raises((OSError, ValueError), match="Not found"):
        store.captions("caption LIKE '%cat%'")


def test_several_shards_in_one_commit_each_replace_their_own_rows(store: PairStore) -> None:
    names = [f"{number}.tar" for number in range(3)]
    for digest in ("d0", "d1"):
        entries = [record(shard=name, digest=digest, pairs=1) for name in names]
        staged = [(entry, store.stage([stored(digest, shard=entry.shard)], record=entry)) for entry in entries]
        before = store.version
        store.commit_shards(staged, replaced=entries if digest == "d1" else [])
        assert store.version == before + 1
    assert sorted((each.shard, each.digest) for each in store.shards()) == [(name, "d1") for name in names]
    assert sorted(row.key for row in store.get(store.matching_ids())) == ["d1"] * 3
    store.drop_shards([record(shard="1.tar")])
    assert sorted(row.shard for row in store.get(store.matching_ids())) == ["0.tar", "2.tar"]
    store.drop_shards([])


def test_the_copy_of_an_image_is_found_by_its_id(store: PairStore) -> None:
    pair = stored("a")
    values = {name: getattr(pair, name) for name in StoredPair.__slots__}
    store.add([StoredPair(**values | {"image_bytes": b"PNG", "thumbnail": b"JPG", "dhash": -5})])
    (row,) = store.get([pair.id], thumbnails=True)
    assert row.image == ImageLocation(uri=f"{store.directory}/pairs.lance#image/id={pair.id}", size=3)
    assert (row.dhash, row.thumbnail, row.image_bytes) == (-5, b"JPG", None)
    store.add([StoredPair(**values | {"image": ImageLocation(uri=""), "sha256": None, "width": None, "height": None})])
    (row,) = store.get([pair.id])
    assert (row.image.uri, row.sha256, row.width) == ("", None, None)


def test_pairs_of_several_fragments_go_at_once_and_others_stay(store: PairStore) -> None:
    shards = [[stored(f"{shard}-{n}") for n in range(6)] for shard in range(4)]
    for pairs in shards:
        store.add(pairs)
    gone = [pair.id for pairs in shards[:2] for pair in pairs[::2]] + [pair.id for pair in shards[2]]
    assert sorted(store.remove([*gone, 5])) == sorted(gone)
    everyone = {pair.id for pairs in shards for pair in pairs}
    assert set(store.matching_ids().tolist()) == everyone - set(gone)
    assert (store.count_removed(), store.removed_ids()) == (12, set(gone))
    store.add([shards[0][0], shards[3][0]])
    assert set(store.matching_ids().tolist()) == everyone - set(gone) | {shards[0][0].id}
    assert store.count_removed() == 11, "who is added again is not taken down any more"
