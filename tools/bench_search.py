"""Vector search beside its rivals at equal threads: what each finds, how fast, in how much memory (rows B1, b9).

    python tools/bench_search.py [--rows 1000000] [--dim 512] [--recall 0.95] [--threads 2] [--skip hnswlib,...]

The vectors are clusters; the queries lie off them by a common shift and noise of their own, as text vectors do. Every
contestant with something to tune takes its fastest settings that reach the recall on one half of the queries; the other
half is searched as one batch, the contestants taking turns, and medians count. The data and the exact answers are kept
under `runs/bench`, the built indices are not. Prints a markdown table; the last line is one JSON document.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from index.search.retriever import Retriever
from index.search.scann_searcher import ScannSearcher, import_scann
from index.search.searcher import ArrayRows, ExactStream, SearcherManifest, build_searcher
from index.search.view import StoreView
from index.store import PairStore

CACHE = Path("runs/bench")
TOP_K = 10
CLUSTER = 200  # rows around one centre, on average

Search = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Data:
    vectors: np.ndarray
    queries: np.ndarray
    truth: np.ndarray  # positions of the true ten


@dataclass
class Contestant:
    name: str
    search: Search
    settings: str = ""
    build_seconds: float = 0.0
    memory: float = 0.0


def make_data(rows: int, dim: int, num_queries: int) -> Data:
    """Generated once, block by block; the truth by exact search."""
    folder = CACHE / f"search-{rows}x{dim}-{num_queries}"
    if not (folder / "truth.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_data(folder, rows, dim, num_queries)
    vectors = np.load(folder / "vectors.npy")
    return Data(vectors, np.load(folder / "queries.npy"), np.load(folder / "truth.npy"))


def _write_data(folder: Path, rows: int, dim: int, num_queries: int) -> None:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((max(1, rows // CLUSTER), dim), dtype=np.float32)
    vectors = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 1 << 15):
        block = vectors[start : start + (1 << 15)]
        block[:] = centres[generator.integers(0, len(centres), len(block))]
        block += 0.9 * generator.standard_normal(block.shape, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    queries = vectors[generator.choice(rows, num_queries)]
    shift = generator.standard_normal(dim).astype(np.float32)
    queries += 0.5 * shift / np.linalg.norm(shift)
    queries += 0.5 / math.sqrt(dim) * generator.standard_normal(queries.shape, dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    truth, _ = ExactStream(ArrayRows(np.arange(rows), vectors)).search(queries, top_k=TOP_K)
    for name, array in (("vectors", vectors), ("queries", queries), ("truth", truth)):
        np.save(folder / f"{name}.npy", array)


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)]))


class Bench:
    def __init__(self, data: Data, *, target: float, threads: int, scratch: Path):
        self.data, self.target, self.threads, self.scratch = data, target, threads, scratch
        self.contestants: list[Contestant] = []

    def build(self, make: Callable[[], Sequence[Contestant]]) -> None:
        """Build one index, tell what it took, and let all contestants over it take part."""
        before, started = used_bytes(), time.perf_counter()
        made = make()
        memory = used_bytes() - before
        for one in made:
            one.build_seconds = one.build_seconds or time.perf_counter() - started
            one.memory = one.memory or memory
        self.contestants += made

    def tune(self, make: Callable[..., Search], grid: Sequence[tuple[int, ...]]) -> tuple[Search, tuple[int, ...]]:
        """The fastest point of the grid that reaches the recall on the first half of the queries, else the best."""
        queries, truth = self.data.queries[::2], self.data.truth[::2]
        tried = []
        for point in grid:
            search = make(*point)
            started = time.perf_counter()
            found = search(queries)
            tried.append((time.perf_counter() - started, recall_of(found, truth), point))
        good = [t for t in tried if t[1] >= self.target]
        point = min(good)[2] if good else max(tried, key=lambda t: t[1])[2]
        return make(*point), point

    def run(self, rounds: int) -> list[dict[str, Any]]:
        queries, truth = self.data.queries[1::2].copy(), self.data.truth[1::2]
        seconds: dict[str, list[float]] = {c.name: [] for c in self.contestants}
        recalls = {c.name: recall_of(c.search(queries), truth) for c in self.contestants}
        for _ in range(rounds):
            for one in self.contestants:
                started = time.perf_counter()
                one.search(queries)
                seconds[one.name].append(time.perf_counter() - started)
        return [
            {
                "name": one.name,
                "qps": round(len(queries) / median(seconds[one.name])),
                "recall_at_10": round(recalls[one.name], 4),
                "build_seconds": round(one.build_seconds, 1),
                "memory_mb": round(one.memory / 1e6),
                "settings": one.settings,
            }
            for one in self.contestants
        ]


def ours(bench: Bench) -> list[Contestant]:
    """ScaNN as `radt index build` sets it up: the raw searcher, our class around it, the store around that."""
    data = bench.data
    folder = bench.scratch / "searcher"
    rows = ArrayRows(np.arange(len(data.vectors)), data.vectors)
    manifest: SearcherManifest = build_searcher(
        "scann", rows, folder, queries=data.queries[::2].copy(), target_recall=bench.target
    )
    before = used_bytes()
    searcher = ScannSearcher.open(folder, manifest)
    memory = used_bytes() - before
    chosen = manifest.settings
    (shard,) = searcher._shards
    text = f"{chosen['leaves']} leaves, {chosen.get('leaves_to_search')} searched, {chosen.get('reorder')} reordered"
    arguments = {
        "final_num_neighbors": TOP_K,
        "leaves_to_search": chosen["leaves_to_search"],
        "pre_reorder_num_neighbors": chosen["reorder"],
    }
    return [
        Contestant(
            "ScaNN, bare, our settings",
            lambda q: shard.raw.search_batched_parallel(q, batch_size=256, **arguments)[0],
            text + f", {chosen['dims_per_block']} dims a block, threshold {chosen['threshold']}",
            memory=memory,
        ),
        Contestant("ScannSearcher", lambda q: searcher.search(q, top_k=TOP_K)[0], "the same", memory=memory),
        *over_store(bench, searcher),
    ]


def over_store(bench: Bench, searcher: ScannSearcher) -> list[Contestant]:
    store = write_store(bench.scratch / "kb", bench.data.vectors)
    searcher.snapshot = store.high_water
    view = StoreView(store, searcher)
    retriever = Retriever(store, searcher)

    def through_retriever(queries: np.ndarray) -> np.ndarray:
        texts = ["any"] * len(queries)
        hits = retriever.search_many(texts, vectors=queries, k=TOP_K, by="clip")
        return np.array([[hit.id for hit in row] + [-1] * (TOP_K - len(row)) for row in hits])

    return [
        Contestant("StoreView", lambda q: view.search(q, top_k=TOP_K, subset=None, exact=False)[0], "the same"),
        Contestant("Retriever by clip, hits fetched", through_retriever, "the same"),
    ]


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


def tutorial(bench: Bench) -> list[Contestant]:
    """ScaNN as its tutorial has it: 2 dims a block, threshold 0.2, 100 reordered, serial batches."""
    rows = len(bench.data.vectors)
    leaves = round(math.sqrt(rows))
    builder = import_scann().builder(bench.data.vectors, TOP_K, "dot_product")
    builder = builder.tree(leaves, max(1, leaves // 20), training_sample_size=min(rows, 250_000))
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100)
    raw = builder.set_n_training_threads(bench.threads).build()
    raw.set_num_threads(bench.threads)
    search, (searched,) = bench.tune(
        lambda n: lambda q: raw.search_batched(q, leaves_to_search=n)[0], [(n,) for n in powers(leaves)]
    )
    return [Contestant("ScaNN, tutorial", search, f"{leaves} leaves, {searched} searched, 2 dims a block, 0.2")]


def faiss_ivf(bench: Bench) -> list[Contestant]:
    import faiss

    rows, dim = bench.data.vectors.shape
    faiss.omp_set_num_threads(bench.threads)
    lists = 1 << round(math.log2(math.sqrt(rows)))
    name = f"IVF{lists},PQ{dim // 4}x4fs,RFlat"
    ivf = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    ivf.train(bench.data.vectors[: min(rows, 100 * lists)])
    ivf.add(bench.data.vectors)
    base = faiss.extract_index_ivf(ivf.base_index)

    def setting(probes: int, factor: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            base.nprobe, ivf.k_factor = probes, factor
            return ivf.search(queries, TOP_K)[1]

        return search

    grid = [(probes, factor) for probes in powers(lists) for factor in (4, 10, 20, 40)]
    search, (probes, factor) = bench.tune(setting, grid)
    return [Contestant(f"faiss {name}", search, f"{probes} probes, {factor * TOP_K} refined")]


def hnsw(bench: Bench) -> list[Contestant]:
    import hnswlib

    rows, dim = bench.data.vectors.shape
    graph = hnswlib.Index(space="ip", dim=dim)
    graph.init_index(max_elements=rows, ef_construction=200, M=16)
    graph.set_num_threads(bench.threads)
    graph.add_items(bench.data.vectors)

    def setting(ef: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            graph.set_ef(ef)
            return graph.knn_query(queries, k=TOP_K)[0].astype(np.int64)

        return search

    search, (ef,) = bench.tune(setting, [(ef,) for ef in (16, 32, 64, 128, 256, 512, 1024)])
    return [Contestant("hnswlib M16", search, f"ef {ef}")]


def powers(most: int) -> list[int]:
    """1 to `most`, each about half as much again as the one before."""
    steps = [1]
    while steps[-1] < most:
        steps.append(min(most, max(steps[-1] + 1, round(1.4 * steps[-1]))))
    return [step for step in steps if step >= most // 200][:14]


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


def print_table(results: Sequence[dict[str, Any]]) -> None:
    first = results[0]["qps"]
    print("| what | queries/s | beside the first | recall@10 | build, s | memory, MB | settings |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        ratio = f"{row['qps'] / first:.2f}"
        cells = [row["name"], row["qps"], ratio, row["recall_at_10"], row["build_seconds"], row["memory_mb"]]
        print("| " + " | ".join(map(str, [*cells, row["settings"]])) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip", default="", help="of tutorial, faiss_ivf, hnsw; with commas")
    options = parser.parse_args()
    # Every library sizes its pool by the processors it sees.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    data = make_data(options.rows, options.dim, options.queries)
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        bench = Bench(data, target=options.recall, threads=options.threads, scratch=scratch)
        for make in (ours, tutorial, faiss_ivf, hnsw):
            if make.__name__ not in options.skip.split(","):
                bench.build(lambda make=make: make(bench))  # type: ignore[misc]
        results = bench.run(options.rounds)
    finally:
        shutil.rmtree(scratch)
    print_table(results)
    print(json.dumps({**vars(options), "machine": platform.processor() or platform.machine(), "results": results}))


if __name__ == "__main__":
    main()
