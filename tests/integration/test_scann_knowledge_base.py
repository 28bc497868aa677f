"""A knowledge base over ScaNN with leaves, and over Lance's lists: the main structure, whole, through its life.

2,500 pairs, and a threshold low enough that they are not simply compared. What the retriever says is held to every
inner product, taken by numpy.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.compaction import compact
from index.knowledge_base import KnowledgeBase
from index.records import ImageLocation, StoredPair
from index.search import scann_searcher
from index.search.duplicates import build_duplicates
from index.search.lance_searcher import LanceSearcher
from index.search.neighbors import NeighborsConfig, write_neighbors
from index.search.scann_searcher import ScannSearcher
from index.search.searcher import exact_searcher, recall_of
from tests.fakes import COLORS, HashEmbedder, draw, encode, needs_scann, sample, write_tar

ROOT = Path(__file__).parents[2]
ROWS, CROWD = 2300, 200
THINGS = (  # noqa: SIM905
    "wolf boat lamp tower violin kettle fern anchor bell crow drum eagle flute goat harp island jug kite ladder mask "
    "needle oar piano quilt rope saddle tent urn vase wheel yacht zebra apple barrel candle dagger engine fox glove hat"
).split()
PLACES = ("beach", "forest", "market", "valley", "cellar", "bridge")
LIMITS = {
    "index.search.sizes.EXACT_BELOW": 300,
    "index.search.lance_searcher._LISTED_FROM": 300,
    "index.knowledge_base.CALIBRATION_CAPTIONS": 120,
    "index.search.calibration._FINAL_ROUNDS": 1,
    "index.search.view._FEW_ROWS": 30,  # what a filter leaves is compared one by one up to here
}
RECALL = 0.95
KINDS = [pytest.param("scann", marks=needs_scann), "lance"]


@pytest.fixture(autouse=True)
def small_limits() -> Iterator[None]:
    """What is meant for twenty thousand rows begins with three hundred."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIMITS.items():
            patch.setattr(name, value)
        yield


def caption_of(number: int) -> str:
    thing, place = THINGS[number // 10 % len(THINGS)], PLACES[number // 400]
    return f"a {COLORS[number % 10]} {thing} in the {place}, number {number:04d}"


def pair(number: int, vector: np.ndarray, *, caption: str | None = None, width: int | None = None) -> StoredPair:
    return StoredPair(
        id=number + 10**15,
        dataset="crowd" if width == 0 else "d",
        source="/s",
        shard=f"s{number // 500}",
        digest="x",
        key=str(number),
        caption=caption or caption_of(number),
        image=ImageLocation(uri=f"/s/{number}.png"),
        sha256=f"{number:064x}",
        width=number % 1000 + 1 if width is None else width,
        height=1,
        vector=vector.astype(np.float32),
    )


def unit(rows: np.ndarray) -> np.ndarray:
    unit_rows: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit_rows


def corpus() -> list[StoredPair]:
    """Pictures near their captions, and one picture that is there two hundred times, in four versions."""
    chance = np.random.default_rng(0)
    texts = HashEmbedder().texts([caption_of(number).replace(",", "") for number in range(ROWS)])
    vectors = unit(texts + 0.5 * unit(chance.standard_normal(texts.shape)))
    versions = np.repeat(0.038 * unit(chance.standard_normal((4, 32))), CROWD // 4, axis=0)
    crowd = unit(unit(chance.standard_normal(32)) + versions + 0.0005 * chance.standard_normal((CROWD, 32)))
    return [
        *(pair(number, vector) for number, vector in enumerate(vectors)),
        *(pair(ROWS + i, vector, caption="a placeholder", width=0) for i, vector in enumerate(crowd)),
    ]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Knowledge bases by the kind of their searcher, each made once; nobody changes them."""
    made: dict[str, Path] = {}

    def get(kind: Any) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("built") / kind
            kb = KnowledgeBase.create(folder, HashEmbedder())
            rows = corpus()
            for start in range(0, len(rows), 500):
                kb.store.add(rows[start : start + 500])
            kb.build_search(kind, recall=RECALL, duplicates=kind == "scann")  # of Lance they take seconds
            kb.tag_build()
            made[kind] = folder
        return made[kind]

    return get


@pytest.fixture(params=KINDS)
def frozen(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> KnowledgeBase:
    return KnowledgeBase.open(built(request.param), HashEmbedder())


@pytest.fixture(params=KINDS)
def kb(request: pytest.FixtureRequest, built: Callable[[str], Path], tmp_path: Path) -> KnowledgeBase:
    """A copy that may be changed."""
    shutil.copytree(built(request.param), tmp_path / "kb")
    return KnowledgeBase.open(tmp_path / "kb", HashEmbedder())


class Truth:
    """Every row as it is now, compared by numpy."""

    def __init__(self, kb: KnowledgeBase, where: str | None = None):
        kb.refresh()
        self.ids, self.vectors = kb.store.ids_and_vectors(where)

    def best(self, queries: np.ndarray, k: int) -> np.ndarray:
        """The k greatest cosines of each query."""
        return -np.sort(-(queries @ self.vectors.T), axis=1)[:, :k]

    def cosine(self, query: np.ndarray, pair_id: int) -> float:
        return float(query @ self.vectors[np.nonzero(self.ids == pair_id)[0][0]])


def questions(num: int = 60) -> list[str]:
    chance = np.random.default_rng(5)
    some = chance.integers(0, ROWS, num)
    return [caption_of(int(number)).partition(",")[0] for number in some]


def check(kb: KnowledgeBase, texts: Sequence[str], *, k: int = 10, where: str | None = None) -> float:
    """The recall of these queries by vector. Every hit is one of the rows as they are now, with its exact score."""
    queries, truth = HashEmbedder().texts(texts), Truth(kb, where)
    answers = kb.retriever.search_many(texts, k=k, by="clip", where=where)
    best, found = truth.best(queries, k).astype(np.float32), np.full((len(texts), k), -np.inf, np.float32)
    for row, (query, hits) in enumerate(zip(queries, answers, strict=True)):
        assert len(hits) == min(k, len(truth.ids))
        for hit in hits:
            assert hit.score == pytest.approx(truth.cosine(query, hit.id), abs=1e-5)
        found[row, : len(hits)] = [hit.score for hit in hits]
    return recall_of(found[:, : best.shape[1]], best)


def test_it_has_leaves_and_finds_what_was_asked_for(frozen: KnowledgeBase) -> None:
    manifest, searcher = frozen.searcher_manifest(), frozen.open_searcher()
    assert manifest is not None
    assert isinstance(searcher, ScannSearcher | LanceSearcher)
    assert searcher.leaves >= (40 if manifest.kind == "scann" else 8)
    assert (manifest.calibrated_on, manifest.warning) == ("captions", "")
    assert manifest.recall_at_10 >= RECALL
    assert check(frozen, questions()) >= RECALL
    assert frozen.unsearched() == 0


@pytest.mark.parametrize("width", [900, 500, 150, 30, 10])
def test_filters_of_every_selectivity(frozen: KnowledgeBase, width: int) -> None:
    """From nine in ten rows to one in a hundred: k of them, with exact scores, and the best as often as asked for."""
    where = f"width BETWEEN 1 AND {width}"
    assert frozen.store.count(where) in range(2 * width, 3 * width + 1)
    assert check(frozen, questions(), where=where) >= RECALL
    for text in questions(4):
        hits = frozen.search(text, k=10, where=where, by="clip")
        assert {hit.id for hit in hits} <= set(frozen.store.matching_ids(where).tolist())


@needs_scann
def test_a_picture_that_is_there_two_hundred_times_is_one_hit(built: Callable[[str], Path]) -> None:
    frozen = KnowledgeBase.open(built("scann"), HashEmbedder())
    summary = frozen.stats()["duplicates"]
    assert (summary["largest"], summary["pairs"]) == (CROWD, CROWD)
    vector = frozen.store.get([10**15 + ROWS], vectors=True)[0].vector
    for by in ("clip", "hybrid"):
        hits = frozen.search("a placeholder", vector=vector, k=5, by=by)  # type: ignore[arg-type]
        assert [hit.dataset for hit in hits] == ["crowd", "d", "d", "d", "d"]


def change(kb: KnowledgeBase) -> tuple[int, int, list[int]]:
    """One row new, one of another picture than before, twenty gone: their ids."""
    chance = np.random.default_rng(9)
    old = kb.store.get([10**15 + 77], vectors=True)[0]
    assert old.vector is not None
    with kb.store.lock():
        kb.store.add([pair(5000, unit(chance.standard_normal(32)), caption="a zeppelin over the bridge")])
        kb.store.add([pair(77, -old.vector, caption="a raven in the cellar")])
    return 10**15 + 5000, 10**15 + 77, kb.remove(where="width BETWEEN 401 AND 410 AND dataset = 'd'")


@pytest.mark.slow
def test_an_older_searcher_obeys_the_newer_table(kb: KnowledgeBase) -> None:
    """What is new, other or gone counts at once, with exact scores; compaction folds it in and changes no answer."""
    replaced_from = kb.store.get([10**15 + 77], vectors=True)[0].vector
    assert kb.search(vector=replaced_from, k=1)[0].id == 10**15 + 77
    before = kb.manifest.searcher
    new, replaced, gone = change(kb)
    assert len(gone) == 20
    assert (kb.manifest.searcher, kb.unsearched()) == (before, 2)
    vectors = {row.id: row.vector for row in kb.store.get([new, replaced], vectors=True)}

    def obeyed() -> None:
        for row in (new, replaced):
            (hit,) = kb.search(vector=vectors[row], k=1)
            assert (hit.id, hit.score) == (row, pytest.approx(1, abs=1e-5))
        assert replaced not in {hit.id for hit in kb.search(vector=replaced_from, k=50)}
        assert kb.search("zeppelin", k=1, by="hybrid")[0].id == new
        assert kb.search("a raven in the cellar", k=1, by="bm25")[0].id == replaced
        hits = kb.retriever.search_many([caption_of(i - 10**15) for i in gone], k=10, by="hybrid")
        assert not {hit.id for each in hits for hit in each} & set(gone)
        assert check(kb, questions()) >= RECALL
        assert check(kb, questions(20), where="width BETWEEN 60 AND 300") >= RECALL

    obeyed()
    kb = KnowledgeBase.open(kb.directory, HashEmbedder())  # another process
    obeyed()
    compact(kb)
    assert (kb.unsearched(), kb.manifest.searcher == before) == (0, False)
    assert kb.searcher_manifest().rows == len(kb) == ROWS + CROWD + 1 - 20  # type: ignore[union-attr]
    obeyed()


def holds(folder: Path, *needles: bytes) -> list[str]:
    """The files with any of these in them."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    )


@pytest.mark.slow
def test_what_is_taken_down_is_nowhere(kb: KnowledgeBase) -> None:
    """Neither its words nor its numbers, in no file: table, searcher, word index, snapshots."""
    pair_id = 10**15 + 1234
    (row,) = kb.store.get([pair_id], vectors=True)
    assert row.vector is not None
    needles = row.caption.encode(), row.vector.tobytes()
    assert any("pairs.lance" in name for name in holds(kb.directory, *needles))
    assert any("searchers" in name for name in holds(kb.directory, needles[1]))
    kb.remove([pair_id])
    assert pair_id not in {hit.id for hit in kb.search(vector=row.vector, k=50)}
    report = compact(kb)
    assert report.snapshots_dropped_for_removed == ("build-1",)
    assert holds(kb.directory, *needles) == []
    for path in (kb.directory / "searchers").rglob("ids.npy"):
        assert pair_id not in np.load(path, allow_pickle=False)


@pytest.mark.parametrize("fusion", ["rrf", "sum", "product"])
def test_hybrid_beside_every_pair_compared(frozen: KnowledgeBase, fusion: Any) -> None:
    """Both raw scores of every hit are exact, and the hits are those of comparing all."""
    texts = questions(12)
    queries, truth = HashEmbedder().texts(texts), Truth(frozen)
    shares = []
    for query, text in zip(queries, texts, strict=True):
        hits = frozen.search(text, k=10, fusion=fusion)
        words = frozen.retriever.contributions(text, [hit.id for hit in hits])
        for hit, terms in zip(hits, words, strict=True):
            assert hit.clip == pytest.approx(truth.cosine(query, hit.id), abs=1e-5)
            assert hit.bm25 == pytest.approx(sum(terms.values()), rel=1e-4, abs=1e-4)
        exact = {hit.score for hit in frozen.search(text, k=10, fusion=fusion, exact=True)}
        shares.append(np.mean([any(abs(hit.score - s) < 1e-5 for s in exact) for hit in hits]))
    # Ranks are of one query's candidates, among which an approximate list has others far down.
    assert np.mean(shares) >= (0.8 if fusion == "rrf" else RECALL)


def test_decomposed_and_spread(frozen: KnowledgeBase) -> None:
    hits = frozen.search("a red wolf next to a blue violin", k=6, decompose="phrases", by="hybrid")
    assert {hit.part for hit in hits} == {"a red wolf", "a blue violin"}
    assert all({"wolf", "violin"} & set(str(hit.part).split()) & set(hit.caption.split()) for hit in hits)

    def likeness(diversity: float) -> float:
        hits = frozen.search("a red wolf", k=8, by="clip", diversity=diversity)
        vectors = np.stack([row.vector for row in frozen.store.get([hit.id for hit in hits], vectors=True)])  # type: ignore[misc]
        return float(np.triu(vectors @ vectors.T, 1).sum())

    assert likeness(0.7) < likeness(0.0)


def test_a_snapshot_is_what_it_was(kb: KnowledgeBase) -> None:
    new, replaced, gone = change(kb)
    past = KnowledgeBase.open(kb.directory, HashEmbedder(), snapshot="build-1")
    assert len(past) == ROWS + CROWD - len(gone), "what was taken down stays so"
    truth = Truth(past)
    assert {new, *gone}.isdisjoint(truth.ids.tolist())
    assert replaced in truth.ids
    assert check(past, questions(10)) == 1.0
    assert past.search("number 0077", k=1, by="bm25")[0].caption == caption_of(77)


@needs_scann
def test_groups_by_the_searcher_are_those_by_products(built: Callable[[str], Path], tmp_path: Path) -> None:
    frozen = KnowledgeBase.open(built("scann"), HashEmbedder())
    by_products = build_duplicates(frozen.store, exact_searcher(frozen.store), tmp_path)
    found = frozen.retriever.view.duplicates
    np.testing.assert_array_equal([by_products.ids, by_products.groups], [found.ids, found.groups])


# Shards that are not in memory


@pytest.fixture
def on_disk(built: Callable[[str], Path], tmp_path: Path) -> KnowledgeBase:
    """A copy whose searcher is loaded anew for every search."""
    shutil.copytree(built("scann"), tmp_path / "kb")
    (path,) = (tmp_path / "kb" / "searchers").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["settings"]["is_resident"] = False
    path.write_text(json.dumps(manifest))
    return KnowledgeBase.open(tmp_path / "kb", HashEmbedder())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are loaded from now on."""
    names: list[str] = []
    load = scann_searcher._load
    monkeypatch.setattr(scann_searcher, "_load", lambda folder: names.append(folder.name) or load(folder))
    return names


def write_training(folder: Path, num: int) -> str:
    """So many pictures with their captions."""
    members: dict[str, bytes] = {}
    for number in range(num):
        members |= sample(number)
    write_tar(folder / "a.tar", members)
    return str(folder)


@needs_scann
def test_pairs_of_which_much_is_excluded_take_no_load_of_their_own(
    on_disk: KnowledgeBase, loaded: list[str], tmp_path: Path
) -> None:
    """Of 40 pictures one is in the knowledge base 70 times, and one 600 times."""
    chance, rows = np.random.default_rng(3), list[StoredPair]()
    for number, times in ((0, 70), (1, 600)):
        digest = sha256(encode(draw(number))).hexdigest()
        for i in range(times):
            row = pair(6000 + 1000 * number + i, unit(chance.standard_normal(32)), caption="a copy")
            rows.append(replace(row, sha256=digest))
    on_disk.store.add(rows)
    source = write_training(tmp_path / "train", 40)
    report = write_neighbors(on_disk, source, tmp_path / "n.parquet", NeighborsConfig(k=3))
    assert (report.pairs, report.short) == (40, 0)
    assert len(loaded) <= 2, "once, or once more for all those queries that were short of hits"


@needs_scann
@pytest.mark.slow
def test_each_shard_is_loaded_once_for_many_queries(
    built: Callable[[str], Path],
    on_disk: KnowledgeBase,
    loaded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kb, resident = on_disk, KnowledgeBase.open(built("scann"), HashEmbedder())
    monkeypatch.setattr("index.search.retriever._EMBED_BATCH", 32)
    texts = questions(300)
    for asked in ({}, {"by": "clip", "where": "width > 200"}):
        expected = resident.retriever.search_many(texts, k=4, **asked)  # type: ignore[arg-type]
        loaded.clear()
        found = kb.retriever.search_many(texts, k=4, **asked)  # type: ignore[arg-type]
        assert found == expected
        assert len(loaded) <= 2, asked  # once, or once more for all those queries that were short of hits
    monkeypatch.setattr("index.search.neighbors.BATCH", 32)
    source = write_training(tmp_path / "train", 100)
    loaded.clear()
    report = write_neighbors(kb, source, tmp_path / "n.parquet", NeighborsConfig(k=3))
    assert report.pairs == 100
    assert len(loaded) <= 2
    monkeypatch.setattr("index.search.duplicates._BATCH", 100)
    loaded.clear()
    build_duplicates(kb.store, kb.open_searcher(), tmp_path / "groups")
    assert len(loaded) <= 6, "the rows at once, and those of the crowd for 22, 44, 88, 176 and 352 neighbours"


# A build that ends before it should

_DIES = """
import os, signal, sys
import index.search.sizes, index.search.scann_searcher as scann, index.knowledge_base as base, index.search.calibration
from tests.fakes import HashEmbedder
index.search.sizes.EXACT_BELOW = 300
def die(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)
place = {"shard": (scann, "_build_shard"), "opened": (scann, "_open_shard"), "named": (base.Manifest, "write")}
owner, name = place[sys.argv[2]]
kb = base.KnowledgeBase.open(sys.argv[1], HashEmbedder())
kb.remove([10**15 + 1])
setattr(owner, name, die)
kb.build_search("scann", recall=0.9)
"""


@needs_scann
@pytest.mark.slow
def test_killed_while_the_searcher_is_built(built: Callable[[str], Path], tmp_path: Path) -> None:
    """Before ScaNN begins, when it has written, and when all is there but for its name in kb.json."""
    moments = ("shard", "opened", "named")
    runs = {}
    for moment in moments:
        shutil.copytree(built("scann"), tmp_path / moment)
        words = [sys.executable, "-c", _DIES, str(tmp_path / moment), moment]
        runs[moment] = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    for moment, run in runs.items():
        _, heard = run.communicate()
        assert run.returncode == -9, heard.decode()
        kb = KnowledgeBase.open(tmp_path / moment, HashEmbedder())
        assert len(list((kb.directory / "searchers").iterdir())) == 2, "the old one, and what the dead left"
        assert check(kb, questions(20)) >= 0.9
        assert 10**15 + 1 not in {hit.id for hit in kb.search(caption_of(1), k=20)}
        if moment != "shard":
            continue  # one is enough: what is swept away is not looked at
        compact(kb)
        assert [f"searchers/{path.name}" for path in (kb.directory / "searchers").iterdir()] == [kb.manifest.searcher]
        assert check(kb, questions(20)) >= 0.9


# A disk that is full

_FULL = """
import json, resource, signal, sys
import index.search.sizes
from index.errors import UserError
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder
index.search.sizes.EXACT_BELOW = 300
kb = KnowledgeBase.open(sys.argv[1], HashEmbedder())
kb.remove([10**15 + 1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
for limit in json.loads(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        kb.build_search("scann", recall=0.9)
        said.append("")
    except UserError as error:
        said.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(said))
"""


@needs_scann
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_searcher(built: Callable[[str], Path], tmp_path: Path) -> None:
    """No file may grow beyond so many bytes, from none to nearly all that the largest takes: each time one sentence."""
    shutil.copytree(built("scann"), tmp_path / "kb")
    before = (tmp_path / "kb" / "kb.json").read_bytes()
    files = sorted({path.stat().st_size for path in (tmp_path / "kb" / "searchers").rglob("*") if path.is_file()})
    limits = [
        *(size - 1 for size in files if 1 < size < 0.9 * files[-1]),
        *range(1000, files[-1] * 9 // 10, files[-1] // 6),
    ]
    words = [sys.executable, "-c", _FULL, str(tmp_path / "kb"), json.dumps(limits)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert len(said) == len(limits) >= 8
    for sentence, limit in zip(said, limits, strict=True):
        assert sentence.count("cannot") == 1, (limit, sentence)
        assert "\n" not in sentence
    assert (tmp_path / "kb" / "kb.json").read_bytes() == before
    kb = KnowledgeBase.open(tmp_path / "kb", HashEmbedder())
    assert [f"searchers/{path.name}" for path in (kb.directory / "searchers").iterdir()] == [kb.manifest.searcher]
    assert check(kb, questions(20)) >= 0.9
    compact(kb)
    assert kb.searcher_manifest().rows == ROWS + CROWD - 1  # type: ignore[union-attr]
