"""Vector search beside its rivals at equal threads and at equal recall (rows B1, b9).

    python tools/bench_search.py [--rows 1000000] [--dim 512] [--data clusters] [--levels 0.95,0.98,0.99] [--threads 2]

Two kinds of data: `clusters` lie far apart, the queries off them by a common shift and noise of their own, as text
vectors do; those of `overlapping` run into each other, and most numbers of a vector say little, as with real
embeddings. One half of the queries calibrates our searcher. With the other half every rival is searched at every point
of its grid (leaves and exact scores, probes and exact scores, ef); of those that reach a level of recall the three that
seemed fastest are timed, all contestants taking turns, and the best median counts: so both sides are tuned alike. The
data, the exact answers and the rivals' indices are kept under `runs/bench`; an index that was kept is loaded, and its
build time is the one of then. Prints markdown tables; the last line is one JSON document.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from index.search.retriever import Retriever
from index.search.scann_searcher import ScannSearcher, import_scann
from index.search.searcher import ArrayRows, ExactStream, build_searcher
from index.search.view import StoreView
from index.store import PairStore

CACHE = Path("runs/bench")
TOP_K = 10
CLUSTER = 200  # rows around one centre, on average
WIDE_CLUSTER = 1000  # of the overlapping ones, at the sizes of a power law
DEPTHS = (20, 30, 40, 50, 70, 100, 150, 200, 300, 500, 800)  # rows scored exactly, the same for ScaNN and faiss
FINALISTS = 3  # of each contestant, timed for every level
STEPS = 18  # up the number of leaves or probes
HARDLY = 0.001
QUICK = 0.2  # seconds below which the best of three counts while the finalists are looked for

Search = Callable[[np.ndarray], np.ndarray]
Point = tuple[int, ...]


@dataclass(frozen=True)
class Data:
    folder: Path
    vectors: np.ndarray
    queries: np.ndarray  # to measure with
    truth: np.ndarray  # positions of the true ten
    calibration: np.ndarray  # queries to set our searcher up with


@dataclass(frozen=True)
class Built:
    """What it took to build an index, when and how."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    threads: int = 1
    memory: float = 0.0
    is_kept: bool = False  # it was built by an earlier run

    def __str__(self) -> str:
        """A cell of the table."""
        words = f"{self.seconds:,.0f} ({self.processor_seconds:,.0f})"
        return f"{words}, {self.threads} threads, earlier" if self.is_kept else words


@dataclass(frozen=True)
class Contestant:
    """An index, ready to be searched in one way."""

    name: str
    search: Search
    settings: str
    built: Built


@dataclass(frozen=True)
class Family:
    """An index, and all the ways in which it may be searched: for each depth, the numbers of leaves from below."""

    name: str
    setting: Callable[..., Search]
    ladders: Sequence[Sequence[Point]]
    settings: str  # of a point, as a format
    built: Built

    def at(self, point: Point) -> Contestant:
        return Contestant(self.name, self.setting(*point), self.settings.format(*point), self.built)


@dataclass(frozen=True)
class Tried:
    point: Point
    recall: float
    qps: float


def make_data(kind: str, rows: int, dim: int, num_queries: int) -> Data:
    """Generated once; the truth by exact search."""
    folder = CACHE / f"search-{'' if kind == 'clusters' else kind + '-'}{rows}x{dim}-{num_queries}"
    if not (folder / "truth.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        vectors, queries = DATA[kind](rows, dim, num_queries)
        truth, _ = ExactStream(ArrayRows(np.arange(rows), vectors)).search(queries, top_k=TOP_K)
        for name, array in (("vectors", vectors), ("queries", queries), ("truth", truth)):
            np.save(folder / f"{name}.npy", array)
    vectors, queries, truth = (np.load(folder / f"{name}.npy") for name in ("vectors", "queries", "truth"))
    return Data(folder, vectors, queries[1::2].copy(), truth[1::2], queries[::2].copy())


def clusters(rows: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Far apart, in all directions alike."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((max(1, rows // CLUSTER), dim), dtype=np.float32)
    vectors = np.empty((rows, dim), np.float32)
    for block in _blocks(vectors):
        block[:] = centres[generator.integers(0, len(centres), len(block))]
        block += 0.9 * generator.standard_normal(block.shape, dtype=np.float32)
        _normalize(block)
    queries = vectors[generator.choice(rows, num_queries)]
    shift = generator.standard_normal(dim).astype(np.float32)
    queries += 0.5 * shift / np.linalg.norm(shift)
    queries += 0.5 / math.sqrt(dim) * generator.standard_normal(queries.shape, dtype=np.float32)
    return vectors, _normalize(queries)


def overlapping(rows: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Wide clusters of unequal sizes in a cone, of few directions that matter, turned so that no number stands out."""
    generator = np.random.default_rng(0)
    spread = np.arange(1, dim + 1, dtype=np.float32) ** -0.75
    spread /= np.linalg.norm(spread)
    turn = (np.linalg.qr(generator.standard_normal((dim, dim)))[0] * spread[:, None]).astype(np.float32)

    def normal(number: int) -> np.ndarray:
        return generator.standard_normal((number, dim), dtype=np.float32) @ turn

    axis, shift = _normalize(generator.standard_normal((2, dim)).astype(np.float32))
    centres = normal(max(1, rows // WIDE_CLUSTER))
    share = np.arange(1, len(centres) + 1) ** -0.5
    vectors = np.empty((rows, dim), np.float32)
    for block in _blocks(vectors):
        block[:] = 0.6 * centres[generator.choice(len(centres), len(block), p=share / share.sum())]
        block += 0.8 * normal(len(block)) + 0.8 * axis
        _normalize(block)
    queries = vectors[generator.choice(rows, num_queries)] + 0.5 * shift + 0.3 * normal(num_queries)
    return vectors, _normalize(queries)


DATA = {"clusters": clusters, "overlapping": overlapping}


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), 1 << 15):
        yield vectors[start : start + (1 << 15)]


def _normalize(vectors: np.ndarray) -> np.ndarray:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)]))


class Bench:
    def __init__(self, data: Data, *, target: float, levels: Sequence[float], threads: int, scratch: Path):
        self.data, self.target, self.levels, self.threads, self.scratch = data, target, levels, threads, scratch

    def built(self, make: Callable[[], Any]) -> tuple[Any, Built]:
        """An index, and what it took to build it."""
        before, started, processor = used_bytes(), time.perf_counter(), time.process_time()
        index = make()
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor
        return index, Built(round(seconds, 1), round(processor_seconds, 1), self.threads, used_bytes() - before)

    def kept(
        self, name: str, make: Callable[[], Any], *, save: Callable[[Any, str], Any], load: Callable[[str], Any]
    ) -> tuple[Any, Built]:
        """A rival's index from an earlier run, or one that is built now and kept."""
        path, note = self.data.folder / f"{name}.index", self.data.folder / f"{name}.json"
        if note.exists():
            index, loaded = self.built(lambda: load(str(path)))
            return index, Built(**{**json.loads(note.read_text()), "memory": loaded.memory, "is_kept": True})
        index, built = self.built(make)
        save(index, str(path))
        took = {"seconds": built.seconds, "processor_seconds": built.processor_seconds, "threads": built.threads}
        note.write_text(json.dumps(took))
        return index, built

    def survey(self, family: Family) -> list[Tried]:
        """Every point of the grid, up each ladder until all levels are reached or two steps find hardly more."""
        tried = []
        for ladder in family.ladders:
            recalls: list[float] = []
            for point in ladder:
                search = family.setting(*point)
                recall, seconds = self._once(search)
                if seconds < QUICK:
                    seconds = min([seconds, *(self._once(search)[1] for _ in range(2))])
                tried.append(Tried(point, round(recall, 4), round(len(self.data.queries) / seconds)))
                recalls.append(recall)
                if recall >= max(self.levels) or (len(recalls) > 2 and recall < recalls[-3] + HARDLY):
                    break
        return tried

    def _once(self, search: Search) -> tuple[float, float]:
        started = time.perf_counter()
        found = search(self.data.queries)
        return recall_of(found, self.data.truth), time.perf_counter() - started

    def time(self, contestants: Sequence[Contestant], *, rounds: int) -> list[dict[str, Any]]:
        """All of them in turns: recall and median rate."""
        recalls = [self._once(one.search)[0] for one in contestants]
        seconds = [[self._once(one.search)[1] for one in contestants] for _ in range(rounds)]
        return [
            {
                "name": one.name,
                "qps": round(len(self.data.queries) / median(times)),
                "recall_at_10": round(recall, 4),
                "build": str(one.built),
                "memory_mb": round(one.built.memory / 1e6),
                "settings": one.settings,
            }
            for one, recall, times in zip(contestants, recalls, zip(*seconds, strict=True), strict=True)
        ]


def finalists(tried: Sequence[Tried], levels: Sequence[float]) -> list[Point]:
    """For each level of recall the points that reach it and seemed fastest."""
    points: list[Point] = []
    for level in levels:
        reached = sorted((t for t in tried if t.recall >= level), key=lambda t: -t.qps)
        points += [t.point for t in reached[:FINALISTS]]
    return list(dict.fromkeys(points))


def frontier(tried: Sequence[Tried]) -> list[Tried]:
    """The curve: from fast to slow, those that find more than all that are faster."""
    curve: list[Tried] = []
    for one in sorted(tried, key=lambda t: -t.qps):
        if not curve or one.recall > curve[-1].recall:
            curve.append(one)
    return curve


def at_levels(timed: Sequence[dict[str, Any]], levels: Sequence[float]) -> dict[float, dict[str, dict[str, Any]]]:
    """The fastest of each name that finds at least so much."""
    best: dict[float, dict[str, dict[str, Any]]] = {level: {} for level in levels}
    for level in levels:
        for row in sorted(timed, key=lambda row: row["qps"]):
            if row["recall_at_10"] >= level:
                best[level][row["name"]] = row
    return best


# The contestants


def ours(bench: Bench) -> tuple[Family, list[Contestant]]:
    """ScaNN as `radt index build` sets it up: the raw searcher at all settings; at ours, all that lies around it."""
    data = bench.data
    folder = bench.scratch / "searcher"
    rows = ArrayRows(np.arange(len(data.vectors)), data.vectors)
    manifest, built = bench.built(
        lambda: build_searcher("scann", rows, folder, queries=data.calibration, target_recall=bench.target)
    )
    before = used_bytes()
    searcher = ScannSearcher.open(folder, manifest)
    searcher.search(data.queries[:1], top_k=TOP_K)  # ScaNN is loaded by the first query
    built = replace(built, memory=used_bytes() - before)
    chosen = manifest.settings
    (shard,) = searcher._shards

    def setting(leaves: int, reorder: int) -> Search:
        effort = {"leaves_to_search": leaves, "pre_reorder_num_neighbors": reorder, "final_num_neighbors": TOP_K}
        return lambda q: shard.raw.search_batched_parallel(q, batch_size=256, **effort)[0]

    words = f"{{}} of {chosen['leaves']} leaves, {{}} reordered, {chosen['dims_per_block']} dims a block"
    family = Family("ScaNN as radt builds it", setting, ladders(chosen["leaves"]), words, built)
    bare = family.at((chosen["leaves_to_search"], chosen["reorder"]))
    around = {
        "ScannSearcher": lambda q: searcher.search(q, top_k=TOP_K)[0],
        **over_store(bench, searcher),
    }
    return family, [
        replace(bare, name="ScaNN, bare, as calibrated"),
        *(Contestant(name, search, "the same", built) for name, search in around.items()),
    ]


def over_store(bench: Bench, searcher: ScannSearcher) -> dict[str, Search]:
    """The same searcher with our store around it, layer by layer."""
    store = write_store(bench.scratch / "kb", bench.data.vectors)
    searcher.snapshot = store.high_water
    view = StoreView(store, searcher)
    retriever = Retriever(store, searcher)

    def fetched(queries: np.ndarray) -> np.ndarray:
        hits = retriever.search_many(["any"] * len(queries), vectors=queries, k=TOP_K, by="clip")
        return np.array([[hit.id for hit in row] + [-1] * (TOP_K - len(row)) for row in hits])

    return {
        "StoreView": lambda q: view.search(q, top_k=TOP_K, subset=None, exact=False)[0],
        "Retriever.nearest": lambda q: retriever.nearest(q, k=TOP_K)[0],
        "Retriever.search_many, rows of hits fetched": fetched,
    }


def write_store(folder: Path, vectors: np.ndarray) -> PairStore:
    """A table of these vectors under ids 0, 1, ..., written as Arrow: a million StoredPairs would take minutes."""
    import lance
    import pyarrow as pa

    folder.mkdir()
    store = PairStore.create(folder, dim=vectors.shape[1])
    schema = store.dataset.schema

    def batches() -> Any:
        for start in range(0, len(vectors), 1 << 14):
            block = vectors[start : start + (1 << 14)]
            ids = np.arange(start, start + len(block))
            columns = {
                "kind": ["pair"] * len(ids),
                "id": ids,
                "dataset": ["bench"] * len(ids),
                "source": ["bench"] * len(ids),
                "shard": [f"{start:09d}"] * len(ids),
                "key": [str(i) for i in ids],
                "caption": [f"number {i}" for i in ids],
                "image_uri": [""] * len(ids),
                "metadata": ["{}"] * len(ids),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), block.shape[1]),
            }
            arrays = [columns.get(field.name, pa.nulls(len(ids), field.type)) for field in schema]
            yield pa.record_batch([pa.array(a, f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    lance.write_dataset(reader, str(folder / "pairs.lance"), schema=schema, mode="append")
    store.refresh()
    store.index_ids()
    return store


def tutorial(bench: Bench) -> Family:
    """ScaNN as its tutorial has it: 2 dims a block, threshold 0.2, 100 reordered, serial batches."""
    rows = len(bench.data.vectors)
    leaves = round(math.sqrt(rows))

    def make() -> Any:
        builder = import_scann().builder(bench.data.vectors, TOP_K, "dot_product")
        builder = builder.tree(leaves, max(1, leaves // 20), training_sample_size=min(rows, 250_000))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100)
        return builder.set_n_training_threads(bench.threads).build()

    def save(raw: Any, folder: str) -> None:
        Path(folder).mkdir()
        raw.serialize(folder, relative_path=True)

    raw, built = bench.kept("scann-tutorial", make, save=save, load=import_scann().load_searcher)
    raw.set_num_threads(bench.threads)
    words = f"{{}} of {leaves} leaves, 100 reordered, 2 dims a block, threshold 0.2"
    steps = [(step,) for step in powers(leaves)]
    return Family(
        "ScaNN by its tutorial", lambda n: lambda q: raw.search_batched(q, leaves_to_search=n)[0], [steps], words, built
    )


def faiss_ivf(bench: Bench) -> Family:
    """Four numbers a code, as its guidelines have it."""
    return _faiss(bench, block=4)


def faiss_fine(bench: Bench) -> Family:
    """Two numbers a code: slower to scan, but fewer rows need exact scores."""
    return _faiss(bench, block=2)


def _faiss(bench: Bench, *, block: int) -> Family:
    import faiss

    rows, dim = bench.data.vectors.shape
    faiss.omp_set_num_threads(bench.threads)
    lists = 1 << round(math.log2(math.sqrt(rows)))
    name = f"IVF{lists},PQ{dim // block}x4fs,RFlat"

    def make() -> Any:
        ivf = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
        ivf.train(bench.data.vectors[: min(rows, 100 * lists)])
        ivf.add(bench.data.vectors)
        return ivf

    ivf, built = bench.kept(f"faiss-{name}", make, save=faiss.write_index, load=faiss.read_index)
    base = faiss.extract_index_ivf(ivf.base_index)

    def setting(probes: int, refined: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            base.nprobe, ivf.k_factor = probes, refined / TOP_K
            return ivf.search(queries, TOP_K)[1]

        return search

    return Family(f"faiss {name}", setting, ladders(lists), "{} probes, {} refined", built)


def hnsw(bench: Bench) -> Family:
    import hnswlib

    rows, dim = bench.data.vectors.shape

    def make() -> Any:
        graph = hnswlib.Index(space="ip", dim=dim)
        graph.init_index(max_elements=rows, ef_construction=200, M=16)
        graph.set_num_threads(bench.threads)
        graph.add_items(bench.data.vectors)
        return graph

    def load(path: str) -> Any:
        graph = hnswlib.Index(space="ip", dim=dim)
        graph.load_index(path)
        return graph

    graph, built = bench.kept("hnswlib-M16-ef200", make, save=lambda graph, path: graph.save_index(path), load=load)
    graph.set_num_threads(bench.threads)

    def setting(ef: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            graph.set_ef(ef)
            return graph.knn_query(queries, k=TOP_K)[0].astype(np.int64)

        return search

    steps = [(ef,) for ef in (10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)]
    return Family("hnswlib M16", setting, [steps], "ef {}", built)


def ladders(most: int) -> list[list[Point]]:
    """For each depth of exact scores, from few leaves to many."""
    return [[(leaves, depth) for leaves in powers(most)] for depth in DEPTHS]


def powers(most: int) -> list[int]:
    """1, 2, 3, 4, 6 and so on, each about half as much again as the one before; at most `most`."""
    steps = [1]
    while steps[-1] < most and len(steps) < STEPS:
        steps.append(min(most, max(steps[-1] + 1, round(1.4 * steps[-1]))))
    return steps


def used_bytes() -> float:
    """What malloc has given out in this process, whatever it keeps of what was freed."""
    libc = ctypes.CDLL("libc.so.6")
    libc.fopen.restype = ctypes.c_void_p
    with tempfile.NamedTemporaryFile("r") as report:
        file = ctypes.c_void_p(libc.fopen(report.name.encode(), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
        totals = report.read().rpartition("</heap>")[2]
    size = {
        kind: float(value) for kind, value in re.findall(r'type="(fast|rest|mmap|current)".*? size="(\d+)"', totals)
    }
    return size["current"] - size["fast"] - size["rest"] + size["mmap"]


def print_calibrated(rows: Sequence[dict[str, Any]]) -> None:
    print("| what | queries/s | beside the first | recall@10 | build, s (processor s) | memory, MB | settings |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row['qps'] / rows[0]['qps']:.2f}"
        cells = [row["name"], row["qps"], ratio, row["recall_at_10"], row["build"], row["memory_mb"], row["settings"]]
        print("| " + " | ".join(map(str, cells)) + " |")


def print_levels(best: dict[float, dict[str, dict[str, Any]]], names: Sequence[str]) -> None:
    """One line for each level and contestant, beside the first of them."""
    print("\n| recall@10 at least | what | queries/s | the first is faster by | recall@10 | settings |")
    print("|---|---|---|---|---|---|")
    for level, rows in best.items():
        for name in names:
            row = rows.get(name)
            if row is None:
                print(f"| {level} | {name} | not reached | | | |")
                continue
            ratio = f"{rows[names[0]]['qps'] / row['qps']:.2f}" if names[0] in rows and name != names[0] else ""
            print(f"| {level} | {name} | {row['qps']} | {ratio} | {row['recall_at_10']} | {row['settings']} |")


def print_builds(families: Sequence[Family]) -> None:
    print("\n| index | build, s (processor s) | memory, MB |\n|---|---|---|")
    for family in families:
        print(f"| {family.name} | {family.built} | {family.built.memory / 1e6:.0f} |")


def compete(bench: Bench, *, skip: Sequence[str], rounds: int) -> dict[str, Any]:
    """Build all, look for the settings, time them in turns, print."""
    family, fixed = ours(bench)
    families = [family, *(make(bench) for make in (tutorial, faiss_ivf, faiss_fine, hnsw) if make.__name__ not in skip)]
    tried = {one.name: bench.survey(one) for one in families}
    contestants = list(fixed)
    for one in families:
        contestants += [one.at(point) for point in finalists(tried[one.name], bench.levels)]
    timed = bench.time(contestants, rounds=rounds)
    best = at_levels(timed[len(fixed) :], bench.levels)
    print_calibrated(timed[: len(fixed)])
    print_levels(best, list(tried))
    print_builds(families)
    curves = {name: [asdict(one) for one in frontier(points)] for name, points in tried.items()}
    return {"as_calibrated": timed[: len(fixed)], "at_levels": best, "curves": curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--data", choices=sorted(DATA), default="clusters")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--recall", type=float, default=0.95, help="that our searcher is calibrated for")
    parser.add_argument("--levels", default="0.95,0.98,0.99", help="of recall, at which all are compared")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip", default="", help="of tutorial, faiss_ivf, faiss_fine, hnsw; with commas")
    options = parser.parse_args()
    # Every library sizes its pool by the processors it sees.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    data = make_data(options.data, options.rows, options.dim, options.queries)
    levels = [float(level) for level in options.levels.split(",")]
    scratch = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        bench = Bench(data, target=options.recall, levels=levels, threads=options.threads, scratch=scratch)
        results = compete(bench, skip=options.skip.split(","), rounds=options.rounds)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps({**vars(options), "machine": platform.processor() or platform.machine(), **results}))


if __name__ == "__main__":
    main()
