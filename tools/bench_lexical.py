"""Search by words beside its rivals: our Lance index, rank-bm25 and bm25s over the same terms (row B2, b12).

    python tools/bench_lexical.py [--captions 1000000] [--queries 100] [--reference-queries 5] [--skip bm25s]

Captions are those of `make_pairs.py`. Queries are their own captions' words: one to six of them, so that frequent and
rare words meet as they do in prompts. Every contestant cuts text with our tokenizer and is built in a process of its
own, so that its memory is its own; rank-bm25 and bm25s get our idf, k1 and b, and then the scores of all three agree.
The times are of `search` for the best ten, one query after another. Prints a markdown table; the last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

CACHE = Path("runs/bench")
TOP_K = 10
DIM = 8  # the vectors do not matter here
BLOCK = 50_000

Answer = tuple[list[int], list[float]]  # positions of captions, best first, and their scores


@dataclass(frozen=True)
class Result:
    name: str
    captions: int
    build_seconds: float
    peak_mib: float  # of the process, above what it has before it builds
    disk_mib: float
    p50_ms: float
    p95_ms: float
    queries: int
    scores: list[list[float]]  # of the best ten, by query


def make_captions(number: int, seed: int = 0) -> list[str]:
    """Made once and kept."""
    path = CACHE / f"captions-{number}-{seed}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            starts = range(0, number, BLOCK)
            blocks = pool.starmap(_block, [(seed, start, min(start + BLOCK, number)) for start in starts])
        temporary = path.with_suffix(".new")
        temporary.write_text("\n".join(caption for block in blocks for caption in block))
        temporary.rename(path)
    return path.read_text().split("\n")


def _block(seed: int, start: int, stop: int) -> list[str]:
    from make_pairs import scene  # beside this file

    return [scene(seed, number).caption for number in range(start, stop)]


def make_queries(captions: Sequence[str], number: int, seed: int = 1) -> list[str]:
    random = Random(seed)
    queries = []
    for _ in range(number):
        words = random.choice(captions).split()
        queries.append(" ".join(random.sample(words, k=min(len(words), random.randint(1, 6)))))
    return queries


# The contestants: each builds, says how large it is on disk, and gives a function from a query to its answer


def build_lance(captions: Sequence[str], folder: Path) -> tuple[Callable[[str], Answer], float]:
    from index.search.lexical import LanceBM25, build_fts
    from index.store import PairStore

    store = PairStore(folder)
    build_fts(store)
    store.index_ids()
    lexical = LanceBM25(store)

    def search(query: str) -> Answer:
        ids, scores = lexical.search(query, top_k=TOP_K)
        return ids.tolist(), scores.tolist()

    indices = folder / "pairs.lance" / "_indices"
    return search, sum(path.stat().st_size for path in indices.rglob("*") if path.is_file()) / 2**20


def write_rows(captions: Sequence[str], folder: Path) -> None:
    """The table that a knowledge base has before its words are indexed; ids are positions."""
    import lance
    import pyarrow as pa

    from index.store import PairStore

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = PairStore.create(folder, dim=DIM)
    schema = store.dataset.schema
    for start in range(0, len(captions), BLOCK):
        some = captions[start : start + BLOCK]
        given = {
            "kind": pa.array(["pair"] * len(some)),
            "id": pa.array(np.arange(start, start + len(some))),
            "dataset": pa.array(["bench"] * len(some)),
            "shard": pa.array([str(start)] * len(some)),
            "caption": pa.array(some),
        }
        columns = [given.get(field.name, pa.nulls(len(some), field.type)) for field in schema]
        lance.write_dataset(pa.Table.from_arrays(columns, schema=schema), store.dataset.uri, mode="append")


def build_rank_bm25(captions: Sequence[str], folder: Path) -> tuple[Callable[[str], Answer], float]:
    from rank_bm25 import BM25Okapi

    from index.search.words import K1, B, Statistics, Tokenizer

    cut = Tokenizer()
    okapi = BM25Okapi([cut(caption) for caption in captions], k1=K1, b=B)
    corpus = Statistics(num_docs=len(captions), total_length=sum(okapi.doc_len), frequencies=_frequencies(okapi))
    okapi.idf = {term: corpus.idf(term) for term in okapi.idf}

    def search(query: str) -> Answer:
        scores = okapi.get_scores(cut(query))
        best = np.argpartition(scores, -TOP_K)[-TOP_K:]
        best = best[np.argsort(-scores[best])]
        return best.tolist(), scores[best].tolist()

    return search, 0.0


def _frequencies(okapi: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for document in okapi.doc_freqs:
        for term in document:
            counts[term] = counts.get(term, 0) + 1
    return counts


def build_bm25s(captions: Sequence[str], folder: Path) -> tuple[Callable[[str], Answer], float]:
    import bm25s

    from index.search.words import K1, B, Tokenizer

    cut = Tokenizer()
    index = bm25s.BM25(k1=K1, b=B, method="lucene")  # its idf is ours; it leaves out the constant factor k1 + 1
    index.index([cut(caption) for caption in captions], show_progress=False)

    def search(query: str) -> Answer:
        ids, scores = index.retrieve([cut(query)], k=TOP_K, show_progress=False)
        return ids[0].tolist(), (scores[0] * (K1 + 1)).tolist()

    return search, 0.0


CONTESTANTS: dict[str, Callable[[Sequence[str], Path], tuple[Callable[[str], Answer], float]]] = {
    "Lance, as radt searches it": build_lance,
    "bm25s": build_bm25s,
    "rank-bm25": build_rank_bm25,
}


def measure(name: str, number: int, queries: Sequence[str], folder: Path) -> Result:
    """Build one contestant and ask it every query; to be called in a process of its own."""
    captions = make_captions(number)
    if name.startswith("Lance"):
        write_rows(captions, folder)
    before = _peak_mib()
    started = time.perf_counter()
    search, disk = CONTESTANTS[name](captions, folder)
    built = time.perf_counter() - started
    search(queries[0])
    times, scores = [], []
    for query in queries:
        started = time.perf_counter()
        _, best = search(query)
        times.append(1e3 * (time.perf_counter() - started))
        scores.append([score for score in best if score > 0])
    return Result(
        name=name,
        captions=number,
        build_seconds=built,
        peak_mib=_peak_mib() - before,
        disk_mib=disk,
        p50_ms=float(np.percentile(times, 50)),
        p95_ms=float(np.percentile(times, 95)),
        queries=len(queries),
        scores=scores,
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def agreement(result: Result, reference: Result) -> float:
    """Share of the queries for which the best ten have the same scores; which of equal captions come may differ."""
    pairs = list(zip(result.scores, reference.scores, strict=False))
    equal = [len(a) == len(b) and np.allclose(a, b, rtol=1e-4) for a, b in pairs]
    return float(np.mean(equal))


def table(results: Sequence[Result]) -> str:
    ours = results[0]
    lines = [
        "| | build, s | peak memory, MiB | on disk, MiB | p50, ms | p95, ms | queries | ours, p50 | top 10 agrees |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        times = f"{result.p50_ms / ours.p50_ms:.1f}x as fast" if result is not ours else ""
        cells = [result.name, f"{result.build_seconds:.1f}", f"{result.peak_mib:.0f}", f"{result.disk_mib:.0f}"]
        cells += [f"{result.p50_ms:.2f}", f"{result.p95_ms:.2f}", str(result.queries), times]
        lines.append(f"| {' | '.join([*cells, f'{agreement(result, ours):.0%}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--reference-queries", type=int, default=5, help="for rank-bm25, which takes seconds for each")
    parser.add_argument("--skip", default="", help="contestants, separated by commas")
    asked = parser.parse_args()
    queries = make_queries(make_captions(asked.captions), asked.queries)
    folder = CACHE / f"lexical-{asked.captions}"
    results = []
    for name in CONTESTANTS:
        if any(part and part in name for part in asked.skip.split(",")):
            continue
        some = queries[: asked.reference_queries] if name == "rank-bm25" else queries
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            results.append(alone.apply(measure, (name, asked.captions, some, folder)))
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{asked.captions:,} captions, {os.cpu_count()} processors, {platform.processor() or platform.machine()}\n")
    print(table(results))
    facts = [{key: value for key, value in asdict(result).items() if key != "scores"} for result in results]
    print(json.dumps({"captions": asked.captions, "results": facts}))


if __name__ == "__main__":
    main()
