"""What the neighbour store saves: the time of encoding prompt and neighbours with the model inside the package.

    python tools/bench_neighbor_store.py KB [--repeats 30] [--json]

Three ways, interleaved, on prompts whose neighbours change from repeat to repeat: all K in one network call (the
default), each in a call of its own (what a store needs), and found in the store. Medians, and their ratios to the
default; the share of a whole request is beside them, for what a ratio is worth.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = ("a wolf", "a red car", "a flag of Chad", "a pizza", "a cat face", "a blue heart", "a clock", "a snowman")


def measure(kb: Path, *, ks: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Medians in milliseconds for each K."""
    import torch

    from radt.neighbor_store import NeighborStore
    from radt.pipeline import TextToImage

    folder = Path(tempfile.mkdtemp(prefix="neighbors-"))
    try:
        plain = TextToImage.load(kb=kb, device="cpu")
        stored = TextToImage(plain.bundle, kb=plain.kb, neighbor_store=NeighborStore(folder, limit=10**9))
        rows = [_row(plain, stored, k=k, repeats=repeats) for k in ks]
        entries, size = stored.neighbor_store.size() if stored.neighbor_store else (0, 0)
        return {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows, "bytes": size // entries}
    finally:
        shutil.rmtree(folder)


def _row(plain: Any, stored: Any, *, k: int, repeats: int) -> dict[str, float]:
    together, apart = plain.settings(k=k), plain.settings(k=k, encode_apart=True)
    found = {prompt: plain.retrieve(prompt, settings=together) for prompt in PROMPTS}
    for prompt, neighbors in found.items():
        stored.encode(prompt, neighbors, settings=apart)  # fills the store
    ways: dict[str, Callable[[str], object]] = {
        "together_ms": lambda prompt: plain.encode(prompt, found[prompt], settings=together),
        "apart_ms": lambda prompt: plain.encode(prompt, found[prompt], settings=apart),
        "stored_ms": lambda prompt: stored.encode(prompt, found[prompt], settings=apart),
        "prompt_alone_ms": lambda prompt: plain.encode(prompt, [], settings=together),
        "whole_picture_ms": lambda prompt: plain.draw(prompt, found[prompt], settings=together, seeds=[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        prompt = PROMPTS[repeat % len(PROMPTS)]
        for name, way in ways.items():
            if name == "whole_picture_ms" and repeat % 4:
                continue
            start = time.perf_counter()
            way(prompt)
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    ratio = medians["stored_ms"] / medians["together_ms"]
    saved = (medians["together_ms"] - medians["stored_ms"]) / medians["whole_picture_ms"]
    return {"k": k, **medians, "stored_over_together": round(ratio, 3), "saved_of_a_picture": round(saved, 3)}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kb", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = measure(args.kb, ks=tuple(args.k), repeats=args.repeats)
    if args.json:
        print(json.dumps(report))
        return
    print(f"torch {report['torch']}, {report['threads']} threads, {report['bytes']} bytes a neighbour")
    names = list(report["rows"][0])
    print(" | ".join(names))
    for row in report["rows"]:
        print(" | ".join(str(row[name]) for name in names))


if __name__ == "__main__":
    main()
