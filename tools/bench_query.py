"""What a whole query costs, part by part, on a warm knowledge base: p50 and p95 in milliseconds, embedding left out.

    python tools/bench_query.py --make 1000000 --kb runs/bench/query-1m      (makes it once, then measures)
    python tools/bench_query.py --kb runs/bench/query-1m [--queries 200] [--searcher scann]

What `--make` makes: 512 numbers a vector, in clusters of about 200; captions of words with Zipf's frequencies; tiny
pictures in one tar; a column that filters of any selectivity can be written on. Queries are captions of other rows, and
their vectors lie off the clusters, as text vectors do. Prints markdown; the last line is one JSON document.
"""

import argparse
import io
import json
import mmap
import os
import platform
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import PIL.Image

from index.knowledge_base import KnowledgeBase
from index.records import ImageLocation, ShardRecord, StoredPair, pair_id

DIM = 512
CLUSTER = 200  # rows around one centre, on average
VOCABULARY = 50_000
PICTURES = 1000
SHARD = 20_000
LEVELS = 1000  # of the column that filters are written on
FILTERS = {0.5: "width < 500", 0.05: "width < 50", 0.001: "width = 7"}
PARTS = ("filter", "vector", "lexical", "fuse", "diversity", "fetch")
K = 5
WARM = 10  # queries before any is measured


class Clusters:
    """An embedder that makes the vector of a text near the centre that its caption belongs to."""

    name = "clusters"
    dim = DIM
    fingerprint = "bench_query clusters"

    def __init__(self, rows: int):
        self.centres = np.random.default_rng(0).standard_normal((max(1, rows // CLUSTER), DIM), dtype=np.float32)
        self.shift = np.random.default_rng(1).standard_normal(DIM).astype(np.float32) * 0.5

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._around(texts, 2) if not texts else _unit(self._around(texts, 2) + self.shift)

    def rows(self, captions: Sequence[str], seed: int) -> np.ndarray:
        return _unit(self._around(captions, seed))

    def _around(self, texts: Sequence[str], seed: int) -> np.ndarray:
        chosen = [crc32(text.encode()) % len(self.centres) for text in texts]
        noise = np.random.default_rng([seed, len(texts)]).standard_normal((len(texts), DIM), dtype=np.float32)
        return self.centres[chosen] + np.float32(0.9) * noise

    images: Any = texts
    prepare: Any = texts
    embed: Any = texts
    image_side: Any = texts
    batch_rows: Any = texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--make", type=int, help="rows of a knowledge base to make there, unless there is one")
    parser.add_argument("--searcher", default="auto", choices=["auto", "exact", "scann", "lance"])
    parser.add_argument("--queries", type=int, default=100, help="of each kind")
    given = parser.parse_args()
    if given.make and not (given.kb / "kb.json").exists():
        make(given.kb, given.make, given.searcher)
    rows = json.loads((given.kb / "bench.json").read_text())["rows"]
    started = time.perf_counter()
    kb = KnowledgeBase.open(given.kb, Clusters(rows))
    retriever = kb.retriever
    opened = time.perf_counter() - started
    texts = list(captions(max(given.queries, WARM) + 1, seed=10**6))
    vectors = kb.embedder.texts(texts)
    first = time.perf_counter()
    retriever.search(texts[-1], vector=vectors[-1], k=K)
    first = time.perf_counter() - first
    for text, vector in zip(texts[:WARM], vectors, strict=False):  # the map of the rows is read when it pays
        retriever.search(text, vector=vector, k=K)
    built = kb.searcher_manifest()
    searcher = built.kind if built else "exact"
    print(f"{rows:,} pairs x {DIM}, searcher {searcher}, {os.cpu_count()} processors, {platform.processor()}")
    print(
        f"opened in {opened:.1f} s, first query {first:.2f} s; p50 / p95 in ms over {given.queries} queries, K = {K}\n"
    )
    print(f"a row of {DIM} numbers at a random place in memory takes {random_row_us():.2f} us here\n")
    print("| by | filter | " + " | ".join(PARTS) + " | whole | images | hits |")
    print("|---|---|" + "---:|" * (len(PARTS) + 3))
    lines = []
    for by in ("clip", "bm25", "hybrid"):
        for selectivity, where in [(1.0, None), *FILTERS.items()]:
            line = measure(retriever, texts[: given.queries], vectors, by=by, where=where)
            lines.append({"by": by, "selectivity": selectivity, **line})
            cells = [f"{low:.1f} / {high:.1f}" for low, high in line["ms"].values()]
            print(f"| {by} | {selectivity:g} | {' | '.join(cells)} | {line['hits']:.2f} |", flush=True)
    print(json.dumps({"rows": rows, "searcher": searcher, "opened_s": opened, "first_s": first, "lines": lines}))


def measure(retriever: Any, texts: Sequence[str], vectors: np.ndarray, *, by: str, where: str | None) -> dict[str, Any]:
    """Percentiles of every part, of the whole query, and of reading the images of its hits."""
    times: dict[str, list[float]] = {name: [] for name in (*PARTS, "whole", "images")}
    hits = 0
    for number, (text, vector) in enumerate(zip(["warm up", *texts], [vectors[-1], *vectors], strict=False)):
        start = time.perf_counter()
        result = retriever.search(text, vector=vector, k=K, by=by, where=where)
        whole = time.perf_counter()
        for hit in result.hits:
            hit.image.read()
        if not number:  # the rows of the filter are found once
            continue
        hits += len(result.hits)
        for name in PARTS:
            times[name].append(result.timings_ms[name])
        times["whole"].append((whole - start) * 1e3)
        times["images"].append((time.perf_counter() - whole) * 1e3)
    percentiles = {name: tuple(np.percentile(values, [50, 95])) for name, values in times.items()}
    return {"ms": percentiles, "hits": hits / len(texts)}


def random_row_us() -> float:
    """What one exact score reads, from small pages as ScaNN's: 0.5 on an idle machine, 10 to 30 on an overrun one."""
    rows = 1 << 18
    memory = np.frombuffer(mmap.mmap(-1, rows * DIM * 4), dtype=np.float32).reshape(rows, DIM)
    memory[:] = 1
    places, times = np.random.default_rng(0).integers(0, rows, (30, 1000)), []
    for some in places:
        start = time.perf_counter()
        memory[some].sum()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / len(places[0]) * 1e6


def make(folder: Path, rows: int, searcher: str) -> None:
    """Write the rows straight to the store, then everything that a build makes after the embedding."""
    embedder = Clusters(rows)
    folder.mkdir(parents=True, exist_ok=True)
    places = write_pictures(folder / "pictures.tar")
    kb = KnowledgeBase.create(folder, embedder)
    started = time.perf_counter()
    for start in range(0, rows, SHARD):
        pairs = list(make_pairs(embedder, places, start, min(SHARD, rows - start)))
        record = ShardRecord(
            dataset="bench",
            source="bench",
            shard=f"{start:09d}",
            digest="",
            stamp="",
            pairs=len(pairs),
            bad=0,
            bytes=0,
        )
        kb.store.commit_shard(record, kb.store.stage(pairs, record=record), is_new=True)
        print(f"\r{start + len(pairs):,} rows, {time.perf_counter() - started:.0f} s", end="", flush=True)
    (folder / "bench.json").write_text(json.dumps({"rows": rows}))
    started = time.perf_counter()
    kb.build_search(searcher)  # type: ignore[arg-type]
    print(f"\nsearch built in {time.perf_counter() - started:.0f} s")


def make_pairs(embedder: Clusters, places: Sequence[ImageLocation], start: int, num: int) -> Iterator[StoredPair]:
    generator = np.random.default_rng([3, start])
    texts = list(captions(num, seed=start))
    vectors = embedder.rows(texts, start)
    levels = generator.integers(LEVELS, size=num)
    hashes = generator.integers(-(2**63), 2**63, size=num, dtype=np.int64)
    for i, caption in enumerate(texts):
        key = f"{start + i:09d}"
        yield StoredPair(
            id=pair_id("bench", "bench", key),
            dataset="bench",
            source="bench",
            shard=f"{start:09d}",
            digest="",
            key=key,
            caption=caption,
            image=places[(start + i) % len(places)],
            sha256=f"{start + i:064x}",
            width=int(levels[i]),
            height=16,
            dhash=int(hashes[i]),
            metadata={"number": start + i},
            vector=vectors[i],
        )


def captions(num: int, *, seed: int) -> Iterator[str]:
    """Three to fifteen words each, word n with a share of 1 / (n + 20)."""
    generator = np.random.default_rng([4, seed])
    weights = 1 / (np.arange(VOCABULARY) + 20.0)
    lengths = generator.integers(3, 16, size=num)
    words = generator.choice(VOCABULARY, size=int(lengths.sum()), p=weights / weights.sum())
    for some in np.split(words, np.cumsum(lengths)[:-1]):
        yield " ".join(f"w{word}" for word in some.tolist())


def write_pictures(path: Path) -> list[ImageLocation]:
    """A tar of small pictures, and where each lies in it."""
    with tarfile.open(path, "w") as tar:
        for number in range(PICTURES):
            content = io.BytesIO()
            PIL.Image.effect_noise((16, 16), 50).save(content, "PNG")
            info = tarfile.TarInfo(f"{number:05d}.png")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)
    with tarfile.open(path) as tar:
        return [ImageLocation(uri=str(path.resolve()), offset=m.offset_data, size=m.size) for m in tar.getmembers()]


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
