"""What a build costs beside its parts: reading and decoding beside clip-retrieval's reader, embedding, and memory.

    python tools/bench_build.py --work DIR [--tables abc] [--pairs 8000] [--embedded 512] [--size 256] [--rounds 5]
                                [--clip-retrieval-python PATH]

Three tables; --tables says which. (a) The whole pipeline without a network (read, decode, resize to 224, write and
commit) beside the reader of clip-retrieval (read, decode, resize, to tensors) on the same tars, with as many workers as
processors; its packages need older ones than ours, so PATH is the Python of an environment of its own: `pip install
clip-retrieval "setuptools<66"`. (b) The pipeline with ViT-B-32, random weights, beside that network alone on ready
tensors, in the same numbers and batches, on the GPU if there is one. (c) Peak memory of (a) over ten times the shards.

Each run is a process of its own; the cases take turns within a round, so that a machine whose speed drifts slows them
alike, and the claim is the ratio of medians. The last line is one JSON document.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve()
SIDE = 224
MODEL = "ViT-B-32/untrained"
BATCH = 256  # clip-retrieval's default


# One run, in a process of its own


class Stopwatch:
    """Seconds by the clock, and those of processors: of this process and of those it has waited for."""

    def __init__(self) -> None:
        self._clock, self._processors = time.perf_counter(), self._used()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._clock, "processor_seconds": self._used() - self._processors}

    def _used(self) -> float:
        used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)


def run_pipeline(tars: Path, scratch: Path, *, embedder: Any, workers: int) -> dict[str, Any]:
    """Read, decode, embed, write and commit everything; no searcher is built."""
    from index.ingest.engines import run_local
    from index.ingest.ledger import Ledger
    from index.ingest.meter import Meter
    from index.ingest.readers import Shard, read
    from index.knowledge_base import KnowledgeBase

    shutil.rmtree(scratch, ignore_errors=True)
    kb = KnowledgeBase.create(scratch, embedder)
    meter, watch = Meter(), Stopwatch()
    with kb.store.lock():
        staged = run_local(
            ((shard, shard.stamp, "unread") for shard in read(str(tars)) if isinstance(shard, Shard)),
            embedder=embedder,
            store=kb.store,
            claim=Ledger(kb.store).claim,
            on_batch=lambda images: None,
            workers=workers,
            meter=meter,
        )
        for shard in staged:
            kb.store.commit_shard(shard.record, shard.rows, is_new=True)
    return {"pairs": meter.pairs, **watch.read(), **waits(meter.progress)}


def waits(progress: Any) -> dict[str, Any]:
    return {"stages": progress.stages, "matrix_share": progress.matrix_share}


def without_network(tars: Path, scratch: Path, workers: int) -> dict[str, Any]:
    """The pipeline with open_clip's preprocessing and vectors that cost nothing."""
    import numpy as np
    from open_clip.transform import image_transform

    from index.preprocessing import split

    parts = split(image_transform(SIDE, is_train=False))
    assert parts is not None
    vector = np.zeros(512, np.float32)
    vector[0] = 1

    class NoNetwork:
        name, dim, fingerprint = "no-network", 512, "0" * 32

        def texts(self, texts: Any) -> Any:
            return np.tile(vector, (len(texts), 1))

        images = embed = texts

        def prepare(self, image: Any) -> Any:
            return np.asarray(parts.resize(image), np.uint8)

        def image_side(self) -> int:
            return SIDE

        def batch_rows(self) -> int:
            return BATCH

    return run_pipeline(tars, scratch, embedder=NoNetwork(), workers=workers)


def clip_retrieval_reader(tars: Path, scratch: Path, workers: int) -> dict[str, Any]:
    """Its reader as its inference has it, captions and metadata included, with a tokenizer that costs nothing."""
    import torch
    from clip_retrieval.clip_inference.reader import WebdatasetReader
    from open_clip.transform import image_transform

    reader = WebdatasetReader(
        lambda urls: urls,
        image_transform(SIDE, is_train=False),
        lambda texts: torch.zeros(len(texts), 77, dtype=torch.long),
        sorted(str(path) for path in tars.glob("*.tar")),
        BATCH,
        workers,
        enable_metadata=True,
    )
    watch = Stopwatch()
    pairs = sum(len(batch["image_tensor"]) for batch in reader)
    return {"pairs": pairs, **watch.read()}


def with_network(tars: Path, scratch: Path, workers: int) -> dict[str, Any]:
    """The pipeline with the real network."""
    from index.embedder import ClipEmbedder

    embedder = ClipEmbedder.load(MODEL)
    return run_pipeline(tars, scratch, embedder=embedder, workers=workers)


def network_alone(tars: Path, scratch: Path, workers: int) -> dict[str, Any]:
    """open_clip's own forward pass on tensors that are ready, as many as there are pairs."""
    import open_clip
    import torch

    from index.embedder import BATCH_ROWS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_clip.create_model("ViT-B-32").eval().to(device)
    pairs = sum(json.loads(path.read_text())["successes"] for path in tars.glob("*_stats.json"))
    batch = torch.randn(BATCH_ROWS[device.type], 3, SIDE, SIDE, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        model.encode_image(batch[:2])
        torch.get_device_module(device).synchronize()
        watch = Stopwatch()
        for done in range(0, pairs, len(batch)):
            model.encode_image(batch[: pairs - done])
        torch.get_device_module(device).synchronize()
    return {"pairs": pairs, **watch.read()}


CASES = {f.__name__: f for f in (without_network, clip_retrieval_reader, with_network, network_alone)}


def run_here(case: str, tars: Path, scratch: Path, workers: int) -> None:
    outcome = CASES[case](tars, scratch, workers)
    print(json.dumps({**outcome, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


# The comparison


def measure(case: str, tars: Path, asked: argparse.Namespace, *, python: str = sys.executable) -> dict[str, Any]:
    """A case in a fresh process."""
    scratch, workers = asked.work / "kb", asked.workers
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [python, "-W", "ignore", str(HERE), "--case", case, "--work", str(tars), "--scratch", str(scratch)]
    done = subprocess.run(
        [*command, "--workers", str(workers)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def corpus(work: Path, *, pairs: int, shards: int, size: int) -> Path:
    out = work / f"pairs-{pairs}-{shards}-{size}"
    numbers = ["--num", str(pairs), "--shard", str(-(-pairs // shards)), "--size", str(size)]
    command = [sys.executable, str(HERE.with_name("make_pairs.py")), str(out), *numbers, "--jpeg"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def rates(cases: dict[str, tuple[Path, str]], asked: argparse.Namespace) -> dict[str, tuple[float, float, str]]:
    """Of each case, (tars, Python), in turn: median pairs a second, median processor milliseconds of a pair, waits."""
    seen: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(asked.rounds):
        for case, (tars, python) in cases.items():
            seen[case].append(measure(case, tars, asked, python=python))
    return {
        case: (
            median(run["pairs"] / run["seconds"] for run in runs),
            median(1000 * run["processor_seconds"] / run["pairs"] for run in runs),
            waited(runs),
        )
        for case, runs in seen.items()
    }


def waited(runs: list[dict[str, Any]]) -> str:
    """`read 3 % decode 90 %`: medians, of a pipeline."""
    if "stages" not in runs[0]:
        return ""
    shares = {stage: median(run["stages"][stage] for run in runs) for stage in runs[0]["stages"]}
    words = [f"{stage} {100 * share:.0f} %" for stage, share in shares.items()]
    matrices = [run["matrix_share"] for run in runs if run["matrix_share"] is not None]
    return " ".join([*words, *([f"matrix units {100 * median(matrices):.0f} %"] if matrices else [])])


def table(title: str, head: str, rows: Iterator[tuple[str, ...]]) -> None:
    print(f"\n{title}\n\n{head}\n{'|---' * (head.count('|') - 1)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def rate_table(title: str, found: dict[str, tuple[float, float, str]], yardstick: str) -> float:
    """Prints it; the ratio of the first case to the yardstick."""
    base = found[yardstick][0]
    rows = (
        (
            case.replace("_", " "),
            f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}",
            f"{rate / base:.2f}",
            f"{used:.2f}",
            waits,
        )
        for case, (rate, used, waits) in found.items()
    )
    table(title, "| case | pairs/s | ratio | processor ms a pair | waits for |", rows)
    return round(next(iter(found.values()))[0] / base, 3)


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    made = {"a": beside_clip_retrieval, "b": beside_the_network, "c": memory}
    return {name: value for letter in asked.tables for name, value in made[letter](asked).items()}


def beside_clip_retrieval(asked: argparse.Namespace) -> dict[str, Any]:
    if not asked.clip_retrieval_python:
        print("\n(a) is left out: it needs --clip-retrieval-python")
        return {}
    tars = corpus(asked.work, pairs=asked.pairs, shards=8, size=asked.size)
    both = {"without_network": (tars, sys.executable), "clip_retrieval_reader": (tars, asked.clip_retrieval_python)}
    title = f"(a) {asked.pairs} pairs of {asked.size} px, {asked.workers} workers"
    return {"to_clip_retrieval": rate_table(title, rates(both, asked), "clip_retrieval_reader")}


def beside_the_network(asked: argparse.Namespace) -> dict[str, Any]:
    tars = corpus(asked.work, pairs=asked.embedded, shards=2, size=asked.size)
    both = {"with_network": (tars, sys.executable), "network_alone": (tars, sys.executable)}
    title = f"(b) {asked.embedded} pairs of {asked.size} px, {MODEL}"
    return {"to_bare_network": rate_table(title, rates(both, asked), "network_alone")}


def memory(asked: argparse.Namespace) -> dict[str, Any]:
    corpora = {
        shards: corpus(asked.work, pairs=shards * asked.pairs // 8, shards=shards, size=asked.size)
        for shards in (4, 40)
    }
    runs: dict[int, list[dict[str, Any]]] = {shards: [] for shards in corpora}
    for _ in range(min(3, asked.rounds)):
        for shards, tars in corpora.items():
            runs[shards].append(measure("without_network", tars, asked))
    peaks = {shards: median(run["peak_mb"] for run in found) for shards, found in runs.items()}
    rows = (
        (str(shards), str(runs[shards][0]["pairs"]), f"{peak:.0f}", f"{peak / peaks[4]:.2f}")
        for shards, peak in peaks.items()
    )
    table("(c) memory of the pipeline without a network", "| shards | pairs | peak MB | ratio |", rows)
    return {"peak_mb": {str(shards): round(peak, 1) for shards, peak in peaks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpora and scratch; kept")
    parser.add_argument("--tables", default="abc", choices=["a", "b", "c", "ab", "ac", "bc", "abc"], metavar="abc")
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--embedded", type=int, default=512, help="pairs for (b)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--clip-retrieval-python", default="", metavar="PATH")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        run_here(asked.case, asked.work, asked.scratch, asked.workers)
        return
    results = compare(asked)
    print("\n" + json.dumps({**results, "processors": os.cpu_count(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
