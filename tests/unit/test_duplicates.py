"""Duplicate groups: the same as by comparing every two, whatever the searcher, and kept beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.errors import ConfigError, KnowledgeBaseError
from index.knowledge_base import KnowledgeBase
from index.records import ImageLocation, StoredPair
from index.search import duplicates as module
from index.search.duplicates import FOLDER, Duplicates, build_duplicates
from index.search.searcher import ExactSearcher, exact_searcher
from index.store import PairStore
from tests.fakes import HashEmbedder, draw

DIM = 16


def pair(number: int, vector: np.ndarray, *, sha256: str | None = None, dhash: int | None = None) -> StoredPair:
    return StoredPair(
        id=number,
        dataset="d",
        source="/s",
        shard="s",
        digest="x",
        key=str(number),
        caption="a picture",
        image=ImageLocation(uri=f"/s/{number}.png"),
        sha256=sha256,
        width=1,
        height=1,
        dhash=dhash,
        vector=vector.astype(np.float32),
    )


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def corpus(seed: int, num: int = 120) -> list[StoredPair]:
    """Clusters of nearly equal vectors, some with hashes, some bytes shared, ids in no order."""
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((num // 4, DIM))
    ids = generator.choice(2**62, size=num, replace=False)
    rows = []
    for number in ids.tolist():
        center = centers[generator.integers(len(centers))]
        vector = unit(unit(center) + generator.choice([0.005, 0.02, 0.2]) * generator.standard_normal(DIM))
        rows.append(
            pair(
                number,
                vector,
                sha256=None if generator.random() < 0.3 else f"bytes {generator.integers(num)}",
                dhash=None if generator.random() < 0.4 else int(generator.choice([0, 1, 7, -1, 2**62])),
            )
        )
    return rows


def twin(rows: Sequence[StoredPair], *, near: float | None, near_bits: int) -> dict[int, int]:
    """Group by id, slowly: every two compared, then everything reachable walked."""

    def alike(a: StoredPair, b: StoredPair) -> bool:
        if a.sha256 is not None and a.sha256 == b.sha256:
            return True
        if near is None or float(np.dot(a.vector, b.vector)) < near:  # type: ignore[arg-type]
            return False
        if a.dhash is None or b.dhash is None:
            return True
        return ((a.dhash ^ b.dhash) % 2**64).bit_count() <= near_bits

    groups: dict[int, int] = {}
    for first in sorted(rows, key=lambda row: row.id):
        reached = [first] if first.id not in groups else []
        while reached:
            row = reached.pop()
            groups[row.id] = first.id
            reached += [other for other in rows if other.id not in groups and alike(row, other)]
    return groups


def store_of(folder: Path, rows: Sequence[StoredPair]) -> PairStore:
    folder.mkdir(parents=True, exist_ok=True)
    store = PairStore.create(folder, dim=DIM)
    store.add(rows)
    return store


class Approximate:
    """Exact search that is not an ExactSearcher, so that the self-join asks for neighbours."""

    def __init__(self, exact: ExactSearcher):
        self.ids, self.snapshot, self.search = exact.ids, exact.snapshot, exact.search


@pytest.mark.parametrize("near", [None, 0.97, 0.999])
@pytest.mark.parametrize("joined", ["products", "neighbours"])
def test_groups_are_those_of_comparing_every_two(tmp_path: Path, near: float | None, joined: str) -> None:
    for seed in range(3):
        rows = corpus(seed)
        store = store_of(tmp_path / str(seed), rows)
        searcher: Any = exact_searcher(store)
        if joined == "neighbours":
            searcher = Approximate(searcher)
        found = build_duplicates(store, searcher, tmp_path / f"searcher{seed}", near=near, near_bits=2)
        expected = twin(rows, near=near, near_bits=2)
        ids = np.array([row.id for row in rows])
        assert dict(zip(ids.tolist(), found.group_of(ids).tolist(), strict=True)) == expected
        sizes = np.unique(list(expected.values()), return_counts=True)[1]
        summary = found.summary()
        assert summary["groups"] == (sizes > 1).sum() > 0
        assert (summary["pairs"], summary["largest"]) == (sizes[sizes > 1].sum(), sizes.max())
        by_bytes = np.unique(list(twin(rows, near=None, near_bits=0).values()), return_counts=True)[1]
        assert summary["exact_pairs"] == by_bytes[by_bytes > 1].sum()


def crowd(around: np.ndarray, num: int, *, seed: int) -> np.ndarray:
    """Unit vectors of which every two have a cosine of at least 0.9965, and fifty each are nearer to one another."""
    chance = np.random.default_rng(seed)
    parts = np.repeat([0.038 * unit(row) for row in chance.standard_normal((num // 50 + 1, DIM))], 50, axis=0)[:num]
    vectors: np.ndarray = unit(around) + parts + 0.0005 * chance.standard_normal((num, DIM))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def arc(num: int, *, plane: tuple[int, int], degrees: float) -> np.ndarray:
    """A chain: rows on a circle, of which only the next few are near."""
    angles = np.deg2rad(degrees) * np.arange(num)
    vectors = np.zeros((num, DIM))
    vectors[:, plane[0]], vectors[:, plane[1]] = np.cos(angles), np.sin(angles)
    return vectors


def rows_of(*parts: np.ndarray, seed: int) -> list[StoredPair]:
    """Pairs of these vectors, without bytes or hashes, under ids in no order."""
    vectors = np.concatenate(parts)
    ids = np.random.default_rng(seed).permutation(len(vectors)).tolist()
    return [pair(number, vector) for number, vector in zip(ids, vectors, strict=True)]


@pytest.mark.parametrize("num", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_picture_that_is_there_often_is_one_group(tmp_path: Path, num: int) -> None:
    """Ten neighbours of each are a part of it: parts that do not see each other would stay apart."""
    chance = np.random.default_rng(num)
    together = crowd(chance.standard_normal(DIM), num, seed=num)
    assert (together @ together.T).min() >= 0.9965
    others = [unit(row) for row in chance.standard_normal((300, DIM))]
    rows = rows_of(together, np.stack(others), seed=num)
    store = store_of(tmp_path / "kb", rows)
    found = build_duplicates(store, Approximate(exact_searcher(store)), tmp_path / "searcher")
    assert (found.summary()["groups"], found.summary()["largest"]) == (1, num)
    assert set(found.ids.tolist()) == {row.id for row in rows[:num]}


@pytest.mark.parametrize(("most", "at_once"), [(11, 1 << 15), (44, 1 << 15), (1408, 1 << 15), (44, 150)])
def test_crowds_and_chains_are_the_groups_of_comparing_every_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, at_once: int
) -> None:
    """However many neighbours are looked at before products take over. Two crowds are bridged; arcs are chains."""
    chance = np.random.default_rng(3)
    one, other, far = np.linalg.qr(chance.standard_normal((DIM, 3)))[0].T
    bridge = np.stack([unit(np.cos(a) * one + np.sin(a) * other) for a in np.deg2rad(np.arange(0, 21, 4))])
    crowds = (crowd(one, 120, seed=0), crowd(bridge[-1], 120, seed=1), crowd(far, 60, seed=2))
    rows = rows_of(*crowds, bridge, arc(100, plane=(0, 1), degrees=0.4), arc(90, plane=(2, 3), degrees=1.9), seed=4)
    store = store_of(tmp_path / "kb", rows)
    whole = build_duplicates(store, exact_searcher(store), tmp_path / "a")
    monkeypatch.setattr(module, "_MOST_NEIGHBORS", most)
    monkeypatch.setattr(module, "_CROWDED_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_BLOCK_LINKS", 3000)
    found = build_duplicates(store, Approximate(exact_searcher(store)), tmp_path / "b")
    np.testing.assert_array_equal([whole.ids, whole.groups], [found.ids, found.groups])
    assert whole.summary()["groups"] >= 3
    assert whole.summary()["largest"] >= 246


def test_blocks_of_products_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "kb", corpus(5))
    whole = build_duplicates(store, exact_searcher(store), tmp_path / "a", near=0.97)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 7 * 120)
    done: list[int] = []
    parts = build_duplicates(
        store, exact_searcher(store), tmp_path / "b", near=0.97, on_batch=lambda now, total: done.append(now)
    )
    np.testing.assert_array_equal([whole.ids, whole.groups], [parts.ids, parts.groups])
    assert done == [*range(7, 120, 7), 120]


def test_what_was_written_is_read_and_is_no_pickle(tmp_path: Path) -> None:
    store = store_of(tmp_path / "kb", corpus(1))
    made = build_duplicates(store, exact_searcher(store), tmp_path / "searcher")
    read = Duplicates.open(tmp_path / "searcher")
    np.testing.assert_array_equal([made.ids, made.groups], [read.ids, read.groups])
    assert read.summary() == made.summary() == json.loads((tmp_path / "searcher/duplicates/manifest.json").read_text())
    assert np.load(tmp_path / "searcher" / FOLDER / "groups.npy", allow_pickle=False).dtype == np.int64
    assert (read.ids[1:] > read.ids[:-1]).all()
    assert [path.name for path in (tmp_path / "searcher").iterdir()] == [FOLDER]


def test_a_broken_file_is_one_sentence(tmp_path: Path) -> None:
    store = store_of(tmp_path / "kb", corpus(1, 20))
    build_duplicates(store, exact_searcher(store), tmp_path)
    (tmp_path / FOLDER / "groups.npy").write_bytes(b"junk")
    with pytest.raises(KnowledgeBaseError, match=r"duplicate groups .* cannot be read"):
        Duplicates.open(tmp_path)


def test_without_groups_every_pair_stands_alone(tmp_path: Path) -> None:
    ids = np.array([5, 3, 9])
    for none in (Duplicates(), Duplicates.open(tmp_path)):
        assert none.group_of(ids).tolist() == [5, 3, 9]
        assert none.members(ids).tolist() == [3, 5, 9]
        assert none.summary() == {}
    store = store_of(tmp_path / "kb", [])
    assert build_duplicates(store, exact_searcher(store), tmp_path / "empty").summary()["groups"] == 0


def test_members_are_the_whole_group_and_those_asked_for() -> None:
    some = Duplicates(ids=np.array([2, 4, 6, 8, 9]), groups=np.array([2, 4, 2, 4, 2]))
    assert some.members(np.array([6])).tolist() == [2, 6, 9]
    assert some.members(np.array([8, 5])).tolist() == [4, 5, 8]
    assert some.without(np.array([9, 1])).members(np.array([6])).tolist() == [2, 6]


def test_many_rows_to_compare_exactly_are_told_apart_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "kb", corpus(2, 40))
    monkeypatch.setattr(module, "COMPARED_ROWS", 39)
    found = build_duplicates(store, exact_searcher(store), tmp_path)
    assert found.summary()["near"] is None
    assert found.summary()["groups"] == found.summary()["exact_groups"]


@pytest.mark.parametrize("near", [0.0, 1.1, float("nan")])
def test_a_cosine_out_of_range_is_one_sentence(tmp_path: Path, near: float) -> None:
    store = PairStore.create(tmp_path, dim=DIM)
    with pytest.raises(ConfigError, match="cosine above 0 and up to 1"):
        build_duplicates(store, exact_searcher(store), tmp_path, near=near)


def test_groups_come_with_the_searcher_unless_they_are_not_wanted(tmp_path: Path) -> None:
    kb = KnowledgeBase.create(tmp_path, HashEmbedder())

    def groups() -> list[str]:
        return [path.parent.name for path in (tmp_path / "searchers").glob(f"*/{FOLDER}")]

    kb.add([draw(0)], "one picture")
    kb.add([draw(0)], "the same picture")
    kb.build_search("exact", duplicates=False)
    kb.build_search("exact")
    assert groups() == [], "as before"
    assert len(kb.search("picture", k=2)) == 1, "the bytes are told apart all the same"
    kb.build_search("exact", duplicates=True)
    assert kb.stats()["duplicates"]["exact_pairs"] == 2
    kb.add([draw(1)], "another picture")
    kb.build_search("exact")
    assert kb.manifest.searcher is not None
    assert Path(kb.manifest.searcher).name in groups(), "as before"
    assert kb.retriever.view.duplicates.summary()["rows"] == 3


def test_sets_joined_in_slices_are_the_connected_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that tie what is tied already are left out before the loop; scipy is the twin."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    chance = np.random.default_rng(0)
    for links in (0, 3, 40, 400):
        one, other = chance.integers(0, 60, size=(2, links))
        monkeypatch.setattr(module, "_JOINED_AT_ONCE", 5)
        forest = module._Forest(60)
        forest.join(one, other)
        graph = coo_matrix((np.ones(links), (one, other)), shape=(60, 60))
        _, labels = connected_components(graph, directed=False)
        smallest = np.array([np.nonzero(labels == label)[0].min() for label in labels])
        assert np.array_equal(forest.roots(), smallest)


def test_a_picture_that_is_there_a_thousand_times_is_linked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_LINKS", 20_000)
    ids = np.arange(1000, dtype=np.int64)
    searcher = ExactSearcher(ids, np.tile(np.eye(1, 8, dtype=np.float32), (1000, 1)))
    links = list(module._all_near_pairs(searcher, ids, near=0.9, on_batch=lambda done, total: None))
    assert sum(len(one) for one, _ in links) == 1000 * 999 // 2
    assert max(len(one) for one, _ in links) <= 20_000
